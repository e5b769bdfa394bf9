"""Entry of ``python -m med3dinsight_ext``."""

import io
import sys

from med3dinsight_ext.cli import main

if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a file, in order with the log
    main()
