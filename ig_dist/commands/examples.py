"""Commands that the help of each verb shows, and the line about a wrong command line."""

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": ("ig-dist quickstart", "ig-dist train digits", "ig-dist sample runs/digits --ig-scale 1.4 --num 64"),
    "quickstart": ("ig-dist quickstart", "ig-dist quickstart --short --out elsewhere"),
    "encode": (
        "ig-dist encode --source digits --dest runs/digits-data --tokenizer pixel",
        "ig-dist encode --source ILSVRC2012_img_train.tar --dest s3://bucket/imagenet --tokenizer sd-vae-ft-ema",
    ),
    "verify": ("ig-dist verify runs/digits-data", "ig-dist verify s3://bucket/imagenet --fast --picture samples.png"),
    "index": ("ig-dist index --shards latents --tokenizer stabilityai/sd-vae-ft-ema --kind moments",),
    "train": (
        "ig-dist train digits",
        "ig-dist train configs/digits.yaml run.dir=runs/mine train.steps=600 optimizer.lr=1e-3",
        "ig-dist train sit_xl2_ig --dry-run --gpus 64",
    ),
    "export": ("ig-dist export runs/digits",),
    "sample": (
        "ig-dist sample runs/digits --ig-scale 1.4 --num 64",
        "ig-dist sample runs/digits --ig-scale 1.4 --num 1797 --evaluate",
    ),
    "evaluate": (
        "ig-dist evaluate runs/digits/samples/PLAN",
        "ig-dist evaluate theirs.npz --reference VIRTUAL_imagenet256_labeled.npz --metrics fid,precision,recall",
    ),
    "sweep": ("ig-dist sweep runs/digits --ig-scale 1.0,1.4,1.7,2.0 --halving",),
    "plans": ("ig-dist plans runs/digits",),
    "reference": ("ig-dist reference runs/digits-data --out digits.npz",),
    "report": ("ig-dist report runs/digits",),
    "convert": (
        "ig-dist convert THEIRS.pt runs/published --tokenizer sd-vae-ft-ema",
        "ig-dist convert runs/published BACK.pt",
    ),
    "launch": (
        "ig-dist launch --processes 2 digits run.dir=runs/two",
        "ig-dist launch --nodes 2 --node-rank 0 --master 10.0.0.1:29500 sit_b2_ig",
        "ig-dist launch --processes 2 --job sample runs/two --ig-scale 1.4",
        "ig-dist launch --processes 2 --job encode --source pictures --dest runs/data --tokenizer pixel",
    ),
    "slurm": (
        "ig-dist slurm --nodes 8 sit_b2_ig run.dir=runs/b2",
        "ig-dist slurm --job sample --tasks 16 runs/b2 --ig-scale 1.4",
        "ig-dist slurm status runs/b2",
    ),
    "slurm status": ("ig-dist slurm status runs/b2",),
    "slurm cancel": ("ig-dist slurm cancel runs/b2",),
    "slurm resume": ("ig-dist slurm resume runs/b2",),
}
EXAMPLES["slurm submit"] = EXAMPLES["slurm"]


def epilog(verb: str) -> str:
    """The examples of a verb, as its help ends with them."""
    lines = EXAMPLES[verb]
    return "\n".join(["\b", "Example:" if len(lines) == 1 else "Examples:", *(f"  {line}" for line in lines)])
