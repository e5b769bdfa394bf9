"""Command line: quickstart, doctor, transfer-report."""

from __future__ import annotations

import fire

from .doctor import doctor
from .quickstart import quickstart
from .weights import transfer_report

if __name__ == "__main__":
    fire.Fire({"quickstart": quickstart, "doctor": doctor, "transfer-report": transfer_report})
