"""Written integer programs, read and solved by another program."""

from __future__ import annotations

import re
from pathlib import Path

import highspy


def solved_elsewhere(path: Path) -> float:
    """Seconds of the optimum that another reader of the LP format finds; the file says what its unit is."""
    unit = re.match(r"\\\* autopar_\w+_in_units_of_(\S+)_s \*\\", path.read_text())
    assert unit is not None
    reader = highspy.Highs()
    reader.setOptionValue("output_flag", False)
    reader.readModel(str(path))
    reader.run()
    return float(reader.getObjectiveValue()) * float(unit[1])
