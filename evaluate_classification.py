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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which `python -P` leaves out
import anml_start  # noqa: F401 (before torch)

# isort: split

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets.images import ImageSet, Pool
from evaluation.plots import comparison_figure, load_matplotlib, or_warn, order_figure, save_png
from evaluation.results import Row, summarise, table
from evaluation.runs import Model, Runs, how_chosen, match_earlier, models_to_test, search_and_report
from flags.evaluation import SCHEDULE, Evaluation
from model.check import Use
from model.fast import choose_backend
from model.guard import Backend
from model.learner import LEARNERS, adam_learner
from model.meta_test import FITTED, MetaTest, with_outputs
from model.modelfactory import Network, fingerprint, trained_parameters
from model.scores import TENTHS
from model.treatments import describe
from utils.command_line import as_tokens, parse, plain, recorded
from utils.distributed import Group, choose_device, is_first, join, run_as
from utils.errors import UserError, load_library, run_script
from utils.flag import arguments
from utils.run import Run, log_to_terminal

RECORDED = ("name", "weights", "sha256", "step")  # of a model, in config.json

log = logging.getLogger("anml")

DEPENDENT = (
    "all class counts share their draws: each point of a curve has the distribution that it has with "
    "draws of its own, but the points are not independent of each other"
)


def evaluate(argv: Sequence[str] = (), **flags: Any) -> Path:
    """Meta-test, as the command line does.

    Args:
        argv: flags as they are typed.
        flags: flags by name.

    Returns:
        the run folder, which `evaluation.results.read_results` reads.

    Raises:
        UserError: a flag or what it names is wrong.
    """
    argv = [*argv, *as_tokens(flags)]
    args = parse(Evaluation, argv)
    run_as(args.processes, argv)
    log_to_terminal()
    load_matplotlib()  # or an evaluation of days would end without a figure, or an interval
    load_library("scipy.special")
    device = choose_device(args.device, args.threads)
    group = join(device, recorded(args))
    models = models_to_test(args)
    sets = images(args, models[0].net, group)
    plan = Plan.of(args, models[0], sets)
    models = [model._replace(net=with_outputs(model.net, plan.outputs).to(device)) for model in models]
    net = models[0].net
    decided = plain(vars(plan))
    options = plan.options if LEARNERS[args.learner].make is adam_learner else {}
    use = Use(meta_test_rln=plan.rln, options=options, channels=sets["evaluation"].channels)
    backend = choose_backend(args.backend, [model.net for model in models], device, use)
    data = sets["evaluation"].about()
    if "background" in sets:
        data |= {"search_data": sets["background"].name, "search_data_hash": sets["background"].data_hash}
    if args.resume is not None:
        fixed = {key: value for key, value in decided.items() if key != "schedule"}
        models = match_earlier(models, fixed | data, args.resume)
    weights = [fingerprint(model.net)[:12] for model in models]
    group.check_same({**data, "models": weights, "backend": backend.name})
    about = {
        "network": net.network,
        "models": [{key: getattr(model, key) for key in RECORDED} for model in models],
        "device": str(device),
        "backend": backend.name,
        "backend_why": backend.why,
        "points": DEPENDENT if args.nested else "each class count has draws of its own",
        **data,
    }
    pools = {split: chosen.pool(device) for split, chosen in sets.items()}
    run = Run.open(args.runs_dir, args.name, args.resume, args, {"plan": decided, **about})
    with run:
        log.info("run folder %s, device %s", run.folder, device)
        log.info("to go on after an interruption: --resume %s", run.folder)
        log.info("treatment %s: --rln %d", plan.treatment, plan.rln)
        make = partial(meta_test, args, plan, backend, pools)
        runs = Runs(args, run, models, make, group)
        rows = search_and_report(args, plan.schedule, runs, {**decided, **about, "arguments": recorded(args)})
        group.leave()
        if is_first():
            show(args, run, plan, len(models), rows)
    return run.folder


def show(args: Evaluation, run: Run, plan: "Plan", models: int, rows: Sequence[Row]) -> None:
    """Draw the figures of a report on so many models, and log the report."""
    with or_warn("accuracy.png"):
        lines = {plan.treatment: summarise(rows)}
        figures = {"accuracy": comparison_figure(lines)}
        if max(plan.schedule) >= len(TENTHS):
            figures["order"] = order_figure(lines)
        for name, figure in figures.items():
            pixels = save_png(figure, run.folder / f"{name}.png")
            run.image(f"meta_test/{name}", pixels, max(plan.schedule))
    log.info("%s", how_chosen(args, models, rows))
    log.info("%s", table(rows))
    if args.nested:
        log.info("%s", DEPENDENT)
    log.info("results.csv, results.json and accuracy.png are in %s", run.folder)


def main() -> None:
    evaluate(sys.argv[1:])


@dataclass(frozen=True)
class Plan:
    """What follows from flags, network and images together: decided once, and recorded beside the flags.

    Attributes:
        treatment: the name of what is evaluated; see `model.treatments`.
        rln: layers that stay as they are at meta-test.
        schedule: class counts to learn.
        outputs: of the head: those of the model, or as many as there are classes to learn by gradient steps.
        test_classes: meta-test classes that draws are made from.
        options: the arguments of the learner, by keyword.
    """

    treatment: str
    rln: int
    schedule: tuple[int, ...]
    outputs: int
    test_classes: int
    options: Mapping[str, Any]

    @classmethod
    def of(cls, args: Evaluation, model: Model, sets: Mapping[str, ImageSet]) -> "Plan":
        """The plan for models like `model`, and the images of each split.

        Without `--schedule`, class counts are those of the paper that there are enough classes and outputs
        for. Where the paper's largest is not among them, the largest possible count is added.

        Raises:
            UserError: images or classes are too few.
        """
        kind, net = LEARNERS[args.learner], model.net
        drawn_from = [sets[split] for split in sets if split == "evaluation" or not kind.fit]
        most = min(map(len, drawn_from))
        if kind.takes_steps:
            most = min(most, net.num_outputs)
        fitting = [*(classes for classes in SCHEDULE if classes <= most), min(most, SCHEDULE[-1])]
        schedule = tuple(args.schedule or dict.fromkeys(fitting))
        for chosen in drawn_from:
            chosen.require(
                args.train_images + args.test_images,
                f"--train_images {args.train_images} and --test_images {args.test_images}",
                args.test_images,
            )
            chosen.limited(max(schedule), "--schedule")
        options, named = learner_options(args, net)
        rln = args.rln
        if rln is None:
            rln = net.default_meta_test_rln if kind.takes_steps else net.layers_below_head
            rln = 0 if args.scratch else rln
        if kind.takes_steps:
            trained_parameters(net, rln)
        treatment = describe(
            *(net.network, model.weights),
            # A learner that changes no weights is named after the network alone.
            rln if kind.takes_steps or args.scratch else net.default_meta_test_rln,
            reset=args.reset and not args.scratch,
            iid=args.iid,
            epochs=args.epoch,
            learner=named,
        )
        outputs = max(net.num_outputs, *schedule) if kind.takes_steps else net.num_outputs
        return cls(treatment, rln, schedule, outputs, len(sets["evaluation"]), options)


def learner_options(args: Evaluation, net: Network) -> tuple[dict[str, Any], str]:
    """The options of `--learner` by keyword, and what treatments call it; empty for the paper's.

    Raises:
        UserError: a gate is asked for in a network that has none.
    """
    options, kind = dict(args.of_learner), LEARNERS[args.learner]
    defaults = {name: made.default for name, made in arguments(kind).items()}
    if "features" in options and not net.has_gate:
        asked = options["features"] if args.resume is None and "features" in args.given else "gated"
        if asked != "gated":
            raise UserError(f"--features {asked}: {net.network} has no gate; drop the flag")
        options["features"] = defaults["features"] = "gated"
    return options, kind.describe(options, defaults)


def images(args: Evaluation, net: Network, group: Group) -> dict[str, ImageSet]:
    """The images by split: the meta-test classes, and the meta-training classes where the learner or the
    search of the learning rate needs them."""
    kind, normalisation = LEARNERS[args.learner], None if args.scratch else net.normalisation
    source = args.source(net)
    found = group.one_before_others(lambda: source.load("evaluation", normalisation))
    sets = {"evaluation": found.limited(args.test_classes, "--test_classes")}
    if kind.fit or (args.lr is None and args.lr_search_split == "background"):
        found = group.one_before_others(lambda: source.load("background", normalisation))
        sets["background"] = found.first(FITTED if kind.fit else max([net.num_outputs, *args.schedule]))
        if kind.fit and (single := sets["background"].sizes.count(1)):
            log.warning("%s: %d classes of one image are left out of the prior", found.name, single)
            if single == len(sets["background"]):
                found.require(2, f"--learner {args.learner}")
    return sets


def meta_test(
    args: Evaluation, plan: Plan, backend: Backend, pools: Mapping[str, Pool], model: Model, split: str
) -> MetaTest:
    """The meta-test of a model on the images of a split."""
    return MetaTest(
        model.net,
        pools[split],
        plan.rln,
        args.seed,
        epochs=args.epoch,
        iid=args.iid,
        reset_all=args.reset or args.scratch,
        class_order=args.class_order,
        split=args.split,
        train_images=args.train_images,
        test_images=args.test_images,
        kind=backend.learner(args.learner),
        options=plan.options,
        background=pools.get("background"),
    )


if __name__ == "__main__":
    run_script(main)
