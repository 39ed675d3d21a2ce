"""``ig-dist convert``."""

from pathlib import Path
from typing import Annotated

from ig_dist.commands.options import AsJson, argument, flag, option, print_json
from ig_dist.terminal import console


def convert(
    source: Annotated[Path, argument("SRC", "Published checkpoint; or a folder of ours, to go back.")],
    dest: Annotated[Path, argument("DEST", "Folder to make; or the file, to go back.")],
    format: Annotated[
        str | None, option("KIND", "sit, repa, ig-sit, lightningdit or ig-lightningdit, where the weights do not tell.")
    ] = None,
    aux_depth: Annotated[
        int | None, option("N", "Block whose output the auxiliary head reads; of XL models: 8.", min=1)
    ] = None,
    num_heads: Annotated[int | None, option("N", "Attention heads of a size that is not published.", min=1)] = None,
    raw: Annotated[bool, flag("--raw", "Take `model` of a checkpoint instead of `ema`.")] = False,
    data: Annotated[
        str | None, option("INDEX", "Its latents' index: DEST can then be sampled from like a run.")
    ] = None,
    tokenizer: Annotated[
        str | None, option("NAME", "Instead of --data, of latents with a fixed scale: sd-vae-ft-ema.")
    ] = None,
    latent_stats: Annotated[
        Path | None,
        option("FILE", "Their mean and std, where there is none: LightningDiT's published latents_stats.pt."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert published weights (SiT, REPA, IG, LightningDiT). To ours, or ours back; nothing in a file is run."""
    from ig_dist.convert.formats import known_format
    from ig_dist.convert.published import convert_back, convert_published

    published = None if format is None else known_format(format)
    if source.is_dir():
        done = convert_back(source, dest, published=published)
    else:
        done = convert_published(
            source,
            dest,
            published=published,
            aux_depth=aux_depth,
            num_heads=num_heads,
            raw=raw,
            index=data,
            tokenizer=tokenizer,
            latent_stats=latent_stats,
        )
    if as_json:
        told = {"format": done.published, "model": done.describe(), "written": str(dest)}
        return print_json({**told, **done.model_dump(include={"parameters", "weights_sha256", "difference"})})
    console.print(f"{done.published}: {done.describe()}")
    console.print(f"{done.parameters:,} parameters, sha256 {done.weights_sha256}")
    console.print(
        "self-check: converting back gives the same bits; velocities at t = 0.25 and 0.75 are finite and differ from"
        f" those of the untouched weights in their own time by {done.difference:g}"
    )
    use = f"; train on from it with train.init_from={dest}" if dest.is_dir() else ""
    use = f"; sample from it with `ig-dist sample {dest}`" if (dest / "config.yaml").is_file() else use
    console.print(f"written: {dest}{use}")
