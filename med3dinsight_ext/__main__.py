"""Entry of ``python -m med3dinsight_ext``."""

from med3dinsight_ext.cli import main

if __name__ == "__main__":
    main()
