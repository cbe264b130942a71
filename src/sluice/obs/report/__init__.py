"""`report.html`: one file about one run or several, made from what a run folder holds.

    run folder ──read──► RunFolder ─┬─► History (log: evaluations, what became of episodes, faults)
                                    ├─► findings (what happened, in words, each with its rule)
                                    └─► chosen episodes, compact
                                                            all of it ──► JSON in a page that asks nobody

Reading takes no lock and changes nothing, so a run that is being written may be read. What is torn, missing or of
another schema is left out and said on the page.
"""
