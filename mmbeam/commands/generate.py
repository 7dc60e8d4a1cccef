"""The command `mmbeam generate`."""

import argparse
from collections.abc import Generator
from typing import TYPE_CHECKING

from mmbeam.commands.common import check_model, job_arguments, number, positive, run_job, shared_options, whole
from mmbeam.errors import UsageError
from mmbeam.names import FORMATS_OF_SYNTHESIS, SYNTHESIS_MODALITIES

if TYPE_CHECKING:
    from mmbeam.jobs.generate import GenerateOptions

ABOUT = "Make an image or speech of the text of every sample, as WebDataset shards."
MAX_QUALITY = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mmbeam generate`."""
    parser.epilog = (
        "Example: mmbeam generate --input 'shards/*.tar' --output out --modality image "
        "--model stable-diffusion-v1-5/stable-diffusion-v1-5."
    )
    job_arguments(parser)
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="hub name with optional @revision, or a directory: a text-to-image pipeline of diffusers, or a VITS",
    )
    parser.add_argument("--modality", choices=SYNTHESIS_MODALITIES, required=True, help="what to make of each text")
    parser.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help="prompt instead of the sample's text: 'A photo of {metadata[title]}'; fields are {text}, {key} and "
        "{metadata[a][b]}, and {{ is a brace",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="random seed (default: 0)")
    parser.add_argument("--steps", type=positive, metavar="N", help="denoising steps (default: the pipeline's own)")
    parser.add_argument(
        "--guidance", type=number, metavar="G", help="scale of classifier-free guidance (default: the pipeline's own)"
    )
    formats = [name for names in FORMATS_OF_SYNTHESIS.values() for name in names]
    parser.add_argument("--format", choices=formats, help="of the files (default: png, wav)")
    parser.add_argument("--quality", type=positive, metavar="Q", help="of jpg and webp, 1 to 100 (default: 95)")
    parser.add_argument("--sample-rate", type=positive, metavar="HZ", help="of sounds (default: the model's own)")


def run(args: argparse.Namespace) -> Generator[str, None, int]:
    """Run the job, and yield its summary."""
    options = _options(args)  # checked before the slow import

    from mmbeam.jobs.generate import prepare

    return (yield from run_job(prepare, options, args))


def _options(args: argparse.Namespace) -> "GenerateOptions":
    from mmbeam.config import Synthesis
    from mmbeam.prompts.template import parse_template

    check_model(args.model)
    if args.prompt is not None:
        parse_template(args.prompt)
    if args.quality is not None and args.quality > MAX_QUALITY:
        raise UsageError(f"`quality` {args.quality}: expected at most {MAX_QUALITY}")
    synthesis = Synthesis(
        modality=args.modality,
        prompt=args.prompt,
        seed=args.seed,
        steps=args.steps,
        guidance=args.guidance,
        format=args.format,
        quality=args.quality,
        sampling_rate=args.sample_rate,
    )
    shared = shared_options(args)

    from mmbeam.jobs.generate import GenerateOptions  # slow

    return GenerateOptions(model=args.model, synthesis=synthesis, **shared)
