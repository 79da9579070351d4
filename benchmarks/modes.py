"""What an image costs in each mode of the shift evaluator: seconds of the same run, on the bundled denoiser.

    python benchmarks/modes.py [images] [repetitions]

One convolutional classifier. Modes are timed in turn, the median of the repetitions counts. The published script's DE
makes 9 forwards of the denoiser and 10 of the classifier; DDA 50 forwards and 50 backwards of the denoiser and 1 of the
classifier.
"""

import sys
import time
from statistics import median

import torch

from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.timm_model import Timm
from robustbench_diffaug.data.corrupted import Corrupted
from robustbench_diffaug.data.embedded import Mnist5k
from robustbench_diffaug.diffusion.adaptation import Adaptation
from robustbench_diffaug.diffusion.unet import UNet
from robustbench_diffaug.engine import settle
from robustbench_diffaug.evaluators.shift import Shift


def main() -> None:
    images, repetitions = (int(word) for word in [*sys.argv[1:], "128", "3"][:2])
    settle("cpu")
    base = Mnist5k(limit=images)
    source = Corrupted(name="noise", base=base, corruption="gaussian_noise", constants="imagenet-c").opened()
    pixels, labels = source.read(range(images))
    batch = Batch("noise", tuple(source.ids), pixels, labels, 0, Limits())
    denoiser = UNet(folder="rdiff:zoo/mnist5k-ddpm")
    model = Timm(
        id="resnet",
        arch="resnet10t",
        args={"channels": [16, 32, 64, 128]},
        classes=10,
        channels=1,
        weights={"uri": "rdiff:zoo/resnet-standard.safetensors"},
    ).loaded(batch.limits)
    settings = Adaptation(variance="small")
    modes = {mode: Shift(modes=(mode,), denoiser=denoiser, dda=settings) for mode in ("default", "de", "dda")}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    with torch.no_grad():
        for _ in range(repetitions + 1):  # the first one warms up
            for mode, evaluator in modes.items():
                begun = time.perf_counter()
                seen: dict[str, list] = {}
                for view in evaluator.views(batch):
                    seen.setdefault(view.name, []).append(evaluator.observe(model, view, batch))
                evaluator.record(seen, batch)
                seconds[mode].append(time.perf_counter() - begun)
    each = {mode: median(found[1:]) / images for mode, found in seconds.items()}
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {images} images of 32 px, {repetitions} times")
    for mode, found in each.items():
        forwards = modes[mode].forwards()
        print(f"{mode:8} {1000 * found:8.2f} ms an image, forwards {forwards.denoiser} + {forwards.backward} backwards")
    print(f"dda / de {each['dda'] / each['de']:.2f}")


if __name__ == "__main__":
    main()
