"""Results in words and tables, for people; with `--json`, as they are."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cifar100cli import console, folders, noise, wording
from cifar100cli.wording import SPLIT_OF, percent, points

if TYPE_CHECKING:
    from cifar100cli.ablation import Ablation
    from cifar100cli.keys import Key
    from cifar100cli.schema import Config

SIDES = {  # of what `bench` measures, for people
    "loop": "training, the real loop",
    "bare": "... the bare step, data ready",
    "plain": "... the plain way",
    "evaluation": "evaluation",
    "bare_evaluation": "... forward passes alone",
    "frozen_part": "... its frozen part, run once",
}
RATIOS = {
    "loop_to_bare_time": "time of the loop / bare step",
    "speedup_over_plain": "speed of the loop / plain way",
    "evaluation_to_bare_time": "time of evaluation / forward",
}


def dry_run(result: Mapping[str, Any], json: bool) -> None:
    """What `--dry-run` found."""
    if json:
        console.result_json(result)
        return
    console.result(
        f"{result['preset']} is ready: {result['backbone']} with {result['parameters']:,} parameters, "
        f"{result['training_images']:,} images of {result['dataset']} "
        f"in {wording.several(result['steps_per_epoch'], 'step')}, "
        f"{wording.several(result['epochs'], 'epoch')}, {result['precision']} on {result['device']}"
    )
    console.result(f"one step on a batch of {tuple(result['batch'])} gave the loss {wording.loss(result['loss'])}")
    console.result("nothing was written (dry run)")


def training(result: Mapping[str, Any], preset: "Config", json: bool) -> None:
    """The end of a training run: its figures, those of the preset, and what one would type next."""
    if json:
        console.result_json(result)
        return
    test, best = result["test"], result["best"]
    how = {
        "best_test": f"epoch {best['epoch']}, the best on the test set itself",
        "best_val": f"epoch {best['epoch']}, the best on the held-out images ({percent(best['top1'])} there)",
        "last": f"epoch {best['epoch']}, the last",
    }[result["select"]]
    synthetic = " of the synthetic (drawn) data" if result["dataset"] == "synthetic" else ""
    console.result(
        f"{result['preset']}, seed {result['seed']}: test{synthetic} {percent(test['top1'])}, "
        f"top-5 {percent(test['top5'])}, loss {wording.loss(test['loss'])}"
    )
    console.result(f"selected: {how}")
    _beside(test["top1"], result["preset"], preset)
    console.result(
        f"{wording.several(result['epochs'], 'epoch')} in {wording.duration(result['seconds'])}, "
        f"{result['images_per_second']:,.0f} images/s in {result['precision']} on {_where(result)}"
    )
    console.result(f"the run is {result['run_dir']}")
    _next(result["run_dir"])


def _beside(top1: float, name: str, config: "Config") -> None:
    """The figure that is published or expected of a preset, and how far from it this one is.

    Settings that are not the preset's own are named: they are what a difference may come from.
    """
    from cifar100cli.config import departures, shipped

    published, expected = config.published, config.expected
    ours = shipped(name) or config
    if config.data.dataset != ours.data.dataset or (published is None and expected is None):
        return
    changes = departures(config, ours)
    if changes:
        told = ", ".join(f"{key} = {here} (not {there})" for key, (here, there) in changes.items())
        console.result(f"not the preset's own settings: {told}")
    if expected is not None:
        console.result(f"expected of the preset: {wording.expected(expected.top1, expected.runs, expected.deviation)}")
    if published is None or config.data.dataset == "synthetic":
        return
    at = f" at epoch {published.epoch}" if published.epoch else ""
    console.result(
        f"published: {percent(published.top1)}{at}; the difference is {points(top1 - published.top1)} points"
    )


def _is_on_its_images(result: Mapping[str, Any], config: "Config") -> bool:
    """Whether a run's data set is the one that its preset's figures are about."""
    from cifar100cli.config import shipped

    ours = shipped(result["preset"]) or config
    return bool(result["dataset"] == ours.data.dataset != "synthetic")


def _next(run: str) -> None:
    console.result(f"next: cifar100 evaluate {wording.argument(run)}")
    root = str(Path(run).parent.parent)
    found_by_itself = root == os.environ.get(folders.RUNS_DIR, folders.DEFAULT_RUNS)
    console.result("      cifar100 report" + ("" if found_by_itself else f" {wording.argument(root)}"))


def seeds(results: Sequence[Mapping[str, Any]], preset: "Config", json: bool) -> None:
    """Runs that differ in their seeds alone: each, and their mean and (sample) deviation."""
    first, published = results[0], preset.published
    top1 = [result["test"]["top1"] for result in results]
    mean, deviation = fmean(top1), noise.deviation(top1)
    if json:
        console.result_json(
            {
                **{key: first[key] for key in ("preset", "dataset", "select", "epochs")},
                "n": len(results),
                "seeds": [result["seed"] for result in results],
                "top1_mean": mean,
                "top1_std": deviation,
                "published_top1": published.top1 if published and _is_on_its_images(first, preset) else None,
                "runs": list(results),
            }
        )
        return
    console.table(
        f"{first['preset']}: {first['dataset']}, test images",
        ("seed", "top-1", "top-5", "loss", "epoch", "run"),
        [
            (
                str(result["seed"]),
                *(percent(result["test"][name]) for name in ("top1", "top5")),
                wording.loss(result["test"]["loss"]),
                str(result["best"]["epoch"]),
                result["run_dir"],
            )
            for result in results
        ],
        right=range(5),
    )
    how = wording.PROTOCOLS[first["select"]]
    spread = "" if deviation is None else f", deviation {100 * deviation:.2f} points"
    console.result(f"mean {percent(mean)}{spread} over {wording.several(len(results), 'seed')} ({how})")
    _beside(mean, first["preset"], preset)
    _next(first["run_dir"])


def ablation(found: "Ablation", json: bool) -> None:
    """What each block of a preset brings."""
    if json:
        console.result_json(asdict(found))
        return
    from cifar100cli import report_text
    from cifar100cli.report import changed

    report_text.show_ablation(found, changed(found))
    if found.select == "best_test":
        console.result(report_text.OPTIMISTIC)
    for note in report_text.ablation_notes([found]):
        console.result(note)
    _next(found.runs[0])


def _where(result: Mapping[str, Any]) -> str:
    """Device, ranks and memory; results of earlier versions tell the first alone."""
    ranks, memory = result.get("ranks", 1), result.get("peak_memory_bytes", 0)
    place = str(result["device"]) if ranks == 1 else f"{ranks} ranks on {result['device'].partition(':')[0]}"
    return f"{place}, peak memory {memory / 2**30:.1f} GiB" if memory else place


def evaluation(result: Mapping[str, Any], json: bool) -> None:
    """What `evaluate` measured."""
    if json:
        console.result_json(result)
        return
    name = "synthetic (drawn)" if result["dataset"] == "synthetic" else result["dataset"]
    views = ", six views of each (test-time augmentation)" if result["tta"] else ""
    if "members" in result:
        members = result["members"]
        console.table(
            f"An ensemble of {len(members)}: alone, and below together",
            ("top-1", "loss", "epoch", "preset", "member"),
            [
                (percent(m["top1"]), wording.loss(m["loss"]), str(m["epoch"]), m["preset"], m["checkpoint"])
                for m in members
            ],
            right=(0, 1, 2),
        )
        together = "together (the mean of their probabilities) "
    else:
        console.result(f"{result['checkpoint']} (epoch {result['epoch']})")
        together = ""
    console.result(f"{together}on {result['count']:,} {result['split']} images of {name}{views}")
    chosen_on = {SPLIT_OF[model["select"]] for model in result.get("members", [result])}
    if result["split"] in chosen_on:
        console.result("the epoch was chosen on these very images: optimistic")
    if result["learned"] and result["split"] == "val":
        console.result("the weights that the run began from, or its teacher, had learned these images: optimistic")
    rows = [
        ("top-1", percent(result["top1"])),
        ("top-5", percent(result["top5"])),
        ("loss", wording.loss(result["loss"])),
        ("calibration error (ECE)", f"{result['ece']:.4f}"),
    ]
    if result["superclass_top1"] is not None:
        rows.append(("superclass top-1", percent(result["superclass_top1"])))
    console.table("", ("measure", "value"), rows, right=(1,))
    if "near_duplicates" in result:
        _near_duplicates(result["near_duplicates"], result["count"])
    ranked = sorted(
        ((top1, name) for name, top1 in result["per_class"].items() if top1 is not None),
        key=lambda c: (-c[0], c[1]),
    )
    some = min(5, len(ranked) // 2)
    console.table(
        "Best and worst classes",
        ("class", "top-1", "class ", "top-1 "),
        [
            (best[1], percent(best[0]), worst[1], percent(worst[0]))
            for best, worst in zip(ranked[:some], ranked[: -some - 1 : -1], strict=True)
        ],
        right=(1, 3),
    )
    console.table(
        "Most frequent confusions",
        ("true", "predicted", "images"),
        [(c["true"], c["predicted"], str(c["count"])) for c in result["confusions"][:10]],
        right=(2,),
    )


def _near_duplicates(found: Mapping[str, Any], count: int) -> None:
    console.table(
        f"Images that are nearly one of the {found['training_images']:,} that were trained on",
        ("images", "count", "top-1"),
        [
            ("near-duplicates", f"{found['count']:,}", percent(found["top1"])),
            ("... in a class that is not their twin's", f"{found['other_class']:,}", ""),
            ("all others", f"{count - found['count']:,}", percent(found["top1_without"])),
        ],
        right=(1, 2),
    )


def prediction(result: Mapping[str, Any], json: bool) -> None:
    """What `predict` thinks of pictures, the most likely class first."""
    if json:
        console.result_json(result)
        return
    if result["dataset"] == "synthetic" and result["images"]:
        console.log("the model was trained on synthetic (drawn) shapes: what it says of photographs means nothing")
    rows = []
    for picture in result["images"]:
        for place, guess in enumerate(picture["top"]):
            name = source(picture["image"])
            rows.append(
                (
                    "" if place else name,
                    guess["class"],
                    percent(guess["probability"]),
                    guess["superclass"] or "-",
                )
            )
    if rows:
        console.table("", ("image", "class", "probability", "superclass"), rows, right=(2,))


def source(image: str) -> str:
    """Where a picture came from, for people."""
    return "standard input" if image == "-" else image


def export(result: Mapping[str, Any], json: bool) -> None:
    """Where the exported model is, and how well it agrees with the one that was trained."""
    if json:
        console.result_json(result)
        return
    console.result(
        f"{result['out']}: {result['bytes'] / 1e6:.1f} MB, operators of ONNX {result['opset']}; "
        f"uint8 images (N, 3, 32, 32) in, logits (N, {result['output']['logits'][1]}) out"
    )
    console.result(f"largest difference from the model under ONNX Runtime: {result['largest_difference']:.1e}")


def bench(result: Mapping[str, Any], json: bool) -> None:
    """What `bench` measured."""
    if json:
        console.result_json(result)
        return
    console.result(
        f"{result['preset']}: {result['backbone']}, {result['batch_size']} images of {result['image_size']} "
        f"pixels a step, {result['precision']} on {result['device']}"
    )
    threads = wording.several(result["threads"], "thread")
    console.result(f"{result['device_name']}, {threads}, PyTorch {result['versions']['torch']}")
    _spreads("images a second", SIDES, result["images_per_second"], "{:,.0f}")
    _spreads("ratio", RATIOS, result["ratios"], "{:.3f}")
    _spreads("share of a step", {name: name for name in result["shares"]}, result["shares"], "{:.1%}")
    run = result["full_run"]
    before = run["seconds_of_frozen_part"]
    console.result(
        f"{result['flops_per_image'] / 1e9:.3g} GFLOP an image; {100 * result['utilization']:.1f}% of the "
        f"{result['peak_flops_per_second'] / 1e12:.3g} TFLOP/s of a large matrix product"
    )
    peak = result["peak_memory_bytes"]
    memory = "not known here" if peak is None else f"{peak / 2**30:.2f} GiB"
    console.result(
        f"peak memory of the steps, without data set and kept features: {memory}; steps: {result['compile']}"
    )
    console.result(
        f"the full run, {wording.several(run['epochs'], 'epoch')} of {run['training_images']:,} images: "
        f"{wording.duration(run['seconds'])} ({run['seconds_per_epoch']:.1f} s an epoch, measuring included"
        f"{f', after {wording.duration(before)} of the frozen part' if before else ''})"
        + (", after the teacher's look at each image, which is not counted" if run["teacher_not_counted"] else "")
    )


def _spreads(title: str, named: Mapping[str, str], found: Mapping[str, Mapping[str, float]], form: str) -> None:
    """A table of what was measured several times, by the names that people read."""
    rows = [
        (words, *(form.format(found[name][key]) for key in ("median", "low", "high")))
        for name, words in named.items()
        if name in found
    ]
    console.table("", (title, "median", "min", "max"), rows, right=(1, 2, 3))


def presets(configs: Mapping[str, "Config"], json: bool) -> None:
    """The presets that there are."""
    if json:
        console.result_json({"presets": [{"name": n, **c.model_dump(mode="json")} for n, c in configs.items()]})
        return
    console.table(
        "",
        ("preset", "published", "expected", "epochs", "chosen by", "what it is"),
        [
            (
                name,
                percent(config.published.top1) if config.published else "-",
                _expected(config),
                str(config.train.epochs),
                wording.PROTOCOLS[config.train.select],
                config.description,
            )
            for name, config in configs.items()
        ],
        right=(1, 2, 3),
    )
    console.result("?: a goal, not measured yet")


def keys(found: Sequence["Key"], json: bool) -> None:
    """What `--set` takes, section by section."""
    if json:
        console.result_json({"keys": [asdict(key) for key in found]})
        return
    sections: dict[str, list[tuple[str, ...]]] = {}
    for key in found:
        section, _, name = key.key.rpartition(".")
        sections.setdefault(section, []).append((name, _as_in_yaml(key.default), key.allowed, key.description))
    for section, rows in sections.items():
        title = f"--set {section}.KEY=VALUE" if section else "--set KEY=VALUE"
        console.table(title, ("key", "default", "may be", "what it is"), rows)


def _as_in_yaml(value: object) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_in_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _expected(preset: "Config") -> str:
    """In a table's cell, where there is no room for words: a question mark on what was not run."""
    expected = preset.expected
    return "-" if expected is None else percent(expected.top1) + ("" if expected.runs else "?")
