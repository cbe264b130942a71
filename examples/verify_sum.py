"""A verifier: reads what the agent left in its folder and prints the reward as its last line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

task = json.loads(Path(os.environ["SLUICE_PROMPT"]).read_text())
answer = Path("answer.txt")
said = answer.read_text().strip() if answer.exists() else ""
last = (re.findall(r"\d+", said) or [""])[-1]
print(json.dumps({"correct": float(last == task["answer"]), "tidy": float(said == last)}))
