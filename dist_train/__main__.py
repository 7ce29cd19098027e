"""`python -m dist_train` is `dist-train`."""

from dist_train.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
