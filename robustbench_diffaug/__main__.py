"""`python -m robustbench_diffaug` is `rdiff`."""

from robustbench_diffaug.cli import main

main()
