"""``python -m tpext`` is ``tpext``."""

from tpext.experiments.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
