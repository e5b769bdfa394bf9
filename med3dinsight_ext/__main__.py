"""Command line: quickstart, doctor."""

from __future__ import annotations

import fire

from .doctor import doctor
from .quickstart import quickstart

if __name__ == "__main__":
    fire.Fire({"quickstart": quickstart, "doctor": doctor})
