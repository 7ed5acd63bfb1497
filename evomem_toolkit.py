"""Around the nouns: where the command ``evomem`` begins, under a name that no other project's package has.

The package index has another project called ``evomem``. Where its files lie in the place of ours, this still runs and
can say so.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; end with exit code 2 if the package ``evomem`` that Python finds is another project's."""
    try:
        from evomem.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("evomem.cli", "evomem.cli.app"):
            raise
        import evomem

        print(
            f"error: the package evomem that Python imports ({evomem.__file__}) is another project's. "
            "Run: pip uninstall evomem; then install evomem-toolkit again",
            file=sys.stderr,
        )
        sys.exit(2)
    run()
