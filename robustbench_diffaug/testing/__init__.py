"""The conformance suite: what authors of datasets, denoisers, checkpoints and evaluators run on their own classes.

Each check raises AssertionError with a sentence that says which promise is broken. In a test of your package:

    from robustbench_diffaug.testing import check_evaluator

    def test_it_keeps_the_promises() -> None:
        check_evaluator(MyEvaluator())
"""

from robustbench_diffaug.testing.checkpoints import check_checkpoint
from robustbench_diffaug.testing.datasets import check_dataset
from robustbench_diffaug.testing.denoisers import check_denoiser
from robustbench_diffaug.testing.evaluators import check_evaluator

__all__ = ["check_checkpoint", "check_dataset", "check_denoiser", "check_evaluator"]
