"""Ray places and supervises: the only folder that imports it. Actors are thin shells around what `inline` runs."""
