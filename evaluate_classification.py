"""Meta-test a model: learn classes it has never seen, one after the other, and measure what remains.

    python evaluate_classification.py --rln 0 --model Neuromodulation_Model.net --name Omni_test_traj \
        --runs 10                                                            # as released: all layers learn
    python evaluate_classification.py --model Neuromodulation_Model.net         # the paper's: head only
    python evaluate_classification.py --model M.net --nested                    # a quarter of the work
    python evaluate_classification.py --model M.net --nested --lr 0.001 --runs 3   # a quick look
    python evaluate_classification.py --treatment-preset Scratch-Oracle --epoch 20
    python evaluate_classification.py --model A.net B.net C.net                 # one row for all of them
    python evaluate_classification.py --resume runs/Omni_test_traj_0            # after an interruption
    python evaluate_classification.py --model A.net --learner slda              # no gradient: minutes
    python evaluate_classification.py --model A.net --processes 2               # two cores, or two GPUs

Per class count: search the learning rate, if the learner has one, then report `--runs` fresh draws at it.
With `--nested` one pass over a draw serves all class counts.
"""

from __future__ import annotations

import utils.start  # noqa: F401 (before torch)

# isort: split

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from datasets import ImageSet, Pool, load_images
from evaluation.journal import Journal
from evaluation.models import (
    Model,
    check_preset,
    distinct,
    load_models,
    match_earlier,
    new_model,
    warn_of_other_data,
)
from evaluation.plots import accuracy_figure, save_png
from evaluation.protocol import report, search
from evaluation.results import Row, summarise, table, write_results
from evaluation.runner import Scorer, scorer
from flags.evaluation import SCHEDULE, Evaluation
from model.fast import Backend, learner
from model.fast.guard import Use, choose_backend
from model.learner import LearnerKind, Settings
from model.meta_test import LEARNERS, MetaTest, check_outputs
from model.modelfactory import Network, fingerprint, trained_parameters
from model.rate_search import RateSearch
from model.scores import MEASURES
from model.treatments import describe
from utils.command_line import parse, recorded
from utils.device import choose_device
from utils.distributed import is_first, join, run_as
from utils.errors import UserError, run_script
from utils.run import Run, log_to_terminal

FITTED = 200  # meta-training classes that a prior is fitted to; more change nothing

log = logging.getLogger("anml")

POINTS = {
    False: "each class count has draws of its own",
    True: "all class counts share their draws: each point of a curve has the distribution that it has with "
    "draws of its own, but the points are not independent of each other",
}
"""What the points of a curve have to do with each other, by `--nested`, for whoever reads the results."""


def evaluate(
    args: Evaluation,
    run: Run,
    scores: Scorer,
    models: list[Model],
    about: dict[str, Any],
    processes: int,
) -> list[dict[str, Any]]:
    """Search and report each class count of `--schedule`, with `--nested` all at once; results are written
    after each."""
    rows: list[dict[str, Any]] = []
    about["search"], about["search_tries"] = [], []
    for counts in [sorted(args.schedule)] if args.nested else [[classes] for classes in args.schedule]:
        rates = dict.fromkeys(counts, args.lr)
        searched = args.lr is None and LEARNERS[args.learner].takes_steps
        searches: dict[int, RateSearch] = {}
        if searched:
            searches = search(
                *(run, scores, models, counts),
                lrs=args.lrs,
                runs=args.lr_search_runs,
                objective="test" if args.test else "train",
                full=args.full_search,
                processes=processes,
            )
        for classes, made in searches.items():
            rates[classes] = made.best()
            tries = {"classes": classes, "made": len(made.scores), "of": made.most}
            about["search_tries"].append(tries)
            for (draw, lr), score in made.scores.items():
                of = {"model": models[draw.model].name, "classes": classes, "draw": draw.number, "lr": lr}
                about["search"].append({**of, **score})
        found_rows = report(run, scores, models, rates, args.runs)
        rows += found_rows
        about["lr_chosen"] = how_chosen(args, models, rows)
        for line in summarise(found_rows):
            values = {"lr": line["lr"], **{m.tag: line[name] for name, m in MEASURES.items()}}
            scalars = {f"meta_test/{tag}": value for tag, value in values.items() if value is not None}
            run.scalars(line["classes"], scalars)
        if is_first():
            write_results(run.folder, rows, about)
    return rows


def main() -> None:
    args = parse(Evaluation)
    run_as(args.processes)
    log_to_terminal()
    device = choose_device(args.device, args.threads)
    group = join(device, recorded(args))
    models = [model._replace(net=model.net.to(device)) for model in models_of(args)]
    net = models[0].net
    kind = LEARNERS[args.learner]
    if kind.takes_steps:  # what does not fit is an error now, not after the data is read
        if args.rln is None:
            args.rln = net.default_meta_test_rln
        trained_parameters(net, args.rln)
        check_outputs(net, max(args.schedule, default=0))
        named = ""
    else:
        named = choose_features(args, kind, net)
    use = Use(net, meta_test_rln=args.rln, optimizer=args.optimizer or "adam")
    backend, why = choose_backend(args.backend, [model.net for model in models], device, use)
    source = args.source()
    warn_of_other_data(models, source)
    normalisation = None if args.scratch else net.normalisation
    images = group.one_before_others(lambda: load_images(source, "evaluation", normalisation))
    sets = {"evaluation": images.limited(args.test_classes, "--test_classes")}
    data = images.about()
    if kind.fit or (args.lr is None and args.lr_search_split == "background"):
        background = group.one_before_others(lambda: load_images(source, "background", normalisation))
        most = FITTED if kind.fit else net.num_outputs if kind.takes_steps else len(background)
        sets["background"] = background.first(most)
        data |= {"search_data": background.name, "search_manifest": background.manifest}
    drawn_from = {split: sets[split] for split in sets if split == "evaluation" or not kind.fit}
    check_sets(args, kind, drawn_from, net)
    pools = {split: chosen.pool(device) for split, chosen in sets.items()}
    if args.resume is not None:
        models = match_earlier(models, data, args.resume)
    group.check_same({**data, "models": [fingerprint(model.net)[:12] for model in models]})
    about = {
        "treatment": treatment(args, models[0], named),
        "network": net.network,
        "rln": frozen_layers(args, net),
        "models": [model.about() for model in models],
        "device": str(device),
        "backend": backend,
        "backend_why": why,
        "points": POINTS[args.nested],
        **data,
    }
    run = Run.open(args.runs_dir, args.name, args.resume, args, about)
    with run, Journal(run.folder / "scores.csv") if group.first else nullcontext() as journal:
        log.info("run folder %s, device %s", run.folder, device)
        log.info("to go on after an interruption: --resume %s", run.folder)
        log.info("treatment %s: --rln %d", about["treatment"], about["rln"])
        scores = scorer(
            *(run, journal, models, partial(meta_test, args, backend, pools), group),
            search_split=args.lr_search_split,
            nested=args.nested,
            track_every=args.track_every,
        )
        rows = evaluate(args, run, scores, models, {**about, "arguments": recorded(args)}, group.size)
        group.leave()
        if not group.first:
            return
        pixels = save_png(accuracy_figure(summarise(rows)), run.folder / "accuracy.png")
        run.image("meta_test/accuracy", pixels, max(args.schedule))
        log.info("%s", how_chosen(args, models, rows))
        log.info("%s", table(rows))
        if args.nested:
            log.info("%s", POINTS[True])
        log.info("results.csv, results.json and accuracy.png are in %s", run.folder)


def models_of(args: Evaluation) -> list[Model]:
    """The models of `--model`, each once; for `--scratch` one new network, of the shape of `--model` if that
    is given. An evaluation that is resumed gets them all; see `match_earlier`."""
    models = load_models(args.model) if args.model else []
    if args.scratch:
        shape = models[0].net if models else None
        network, widths = (shape.network, shape.widths) if shape else (args.treatment or "ANML", args.widths)
        models = [new_model(network, widths, args.seed)]
    check_preset(models[0], args.treatment_preset)
    return models if args.resume else distinct(models)


def meta_test(
    args: Evaluation, backend: Backend, pools: Mapping[str, Pool], model: Model, split: str
) -> MetaTest:
    """The meta-test of a model, on the device of the images of a split."""
    kind = LEARNERS[args.learner]
    named = ("optimizer",) if kind.options is None else kind.options
    return MetaTest(
        model.net,
        pools[split],
        frozen_layers(args, model.net),
        args.seed,
        epochs=args.epoch,
        iid=args.iid,
        reset_all=args.reset or args.scratch,
        class_order=args.class_order,
        split=args.split,
        train_images=args.train_images,
        test_images=args.test_images,
        learner=learner(args.learner, backend),
        settings=Settings(**{name: getattr(args, name) for name in named}),
        own_head=kind.takes_steps,
        fit=kind.fit,
        background=pools.get("background"),
    )


def frozen_layers(args: Evaluation, net: Network) -> int:
    """Layers that an evaluation leaves as they are: `--rln`, or all but the head for a learner that changes
    no weights. (With `--scratch` these start anew in each run, and so does what it sees.)"""
    if args.rln is not None:
        return args.rln
    return 0 if args.scratch else net.layers_below_head


def check_sets(args: Evaluation, learner: LearnerKind, sets: Mapping[str, ImageSet], net: Network) -> None:
    """Raise UserError where images or classes are too few, and fill in what depends on their number.

    Without `--schedule`, class counts are those of the paper that there are enough classes and outputs
    for; of fewer than its largest all classes are one count more.

    Args:
        sets: those that runs are drawn from.
    """
    args.test_classes = len(sets["evaluation"])
    most = min(map(len, sets.values()))
    if learner.takes_steps:
        most = min(most, net.num_outputs)
    if not args.schedule:
        fitting = [classes for classes in SCHEDULE if classes <= most]
        args.schedule = fitting if fitting == list(SCHEDULE) else list(dict.fromkeys([*fitting, most]))
    for split, chosen in sets.items():
        chosen.require(
            args.train_images + args.test_images,
            f"--train_images {args.train_images} and --test_images {args.test_images}",
        )
        if max(args.schedule) > len(chosen):
            raise UserError(
                f"--schedule asks for {max(args.schedule)} classes; there are {len(chosen)} "
                f"of {chosen.name}" + (" (see --test_classes)" if split == "evaluation" else "")
            )


def choose_features(args: Evaluation, learner: LearnerKind, net: Network) -> str:
    """Fill in what the learner sees where `--features` does not say; returns what treatments call it.

    Raises:
        UserError: a gate is asked for in a network that has none.
    """
    defaults = dict(learner.options or {})
    if "features" in defaults and not net.has_gate:
        defaults["features"] = "gated"
        if args.features not in (None, "gated"):
            raise UserError(f"--features {args.features}: {net.network} has no gate; drop the flag")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return learner.describe({name: getattr(args, name) for name in defaults}, defaults)


def treatment(args: Evaluation, model: Model, learner: str) -> str:
    """The name of what this evaluation does, with a learner that takes no steps under its own name."""
    kind = (model.net.network, model.weights)
    if learner:
        return describe(*kind, 0 if args.scratch else model.net.default_meta_test_rln, learner=learner)
    return describe(
        *kind,
        frozen_layers(args, model.net),
        reset=args.reset and not args.scratch,
        iid=args.iid,
        epochs=args.epoch,
        optimizer=args.optimizer,
    )


def how_chosen(args: Evaluation, models: list[Model], rows: Sequence[Row]) -> str:
    """One line on where the learning rates of `rows` come from, so that nobody reads a leak as a result,
    or a search that ended at its edge as one that found the best."""
    if not LEARNERS[args.learner].takes_steps:
        return f"no learning rate: {LEARNERS[args.learner].title} takes no steps"
    if args.lr is not None:
        return f"learning rate {args.lr:g} as given"
    pool = "the meta-test classes themselves, as released"
    if args.lr_search_split == "background":
        pool = "meta-training classes, none of those reported on"
    draws = f"{args.lr_search_runs} draws" + (f" for each of {len(models)} models" if len(models) > 1 else "")
    accuracy = f"meta-test {'test' if args.test else 'train'} accuracy"
    low, high = min(args.lrs), max(args.lrs)
    rates = f"of {len(args.lrs)} from {low:g} to {high:g}, the one that wins most draws"
    text = f"learning rates chosen by {accuracy} on {draws} of {pool}; {rates}"
    edges = {row["classes"]: row["lr"] for row in rows if row["lr"] in (low, high)}
    if low == high or not edges:
        return text
    at = ", ".join(f"{lr:g} for {classes} classes" for classes, lr in edges.items())
    return f"{text}; at the edge of these, beyond which a better one may lie: {at}"


if __name__ == "__main__":
    run_script(main)
