"""``python -m evomem`` is the command ``evomem``."""

from evomem.cli.app import main

if __name__ == "__main__":
    main()
