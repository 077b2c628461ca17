"""Meta-test a model: learn classes it has never seen, one after the other, and measure what remains.

    python evaluate_classification.py --rln 0 --model Neuromodulation_Model.net --name Omni_test_traj \
        --runs 10                                                            # as released: all layers learn
    python evaluate_classification.py --model Neuromodulation_Model.net         # the paper's: head only
    python evaluate_classification.py --model M.net --schedule 10 100 --lr 0.001 --runs 3   # a quick look
    python evaluate_classification.py --treatment-preset Scratch-Oracle --epoch 20
    python evaluate_classification.py --model A.net B.net C.net                 # one row for all of them
    python evaluate_classification.py --resume runs/Omni_test_traj_0            # after an interruption

Per class count: search the learning rate, then report `--runs` fresh draws at it.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from datasets import load_pool
from model.meta_test import Trial, best_rate
from model.modelfactory import trained_parameters
from model.treatments import describe
from utils.arguments import evaluation_parser, parse, recorded
from utils.device import choose_device
from utils.errors import UserError, run_script
from utils.journal import Journal
from utils.models import Model, load_models, match_earlier
from utils.plots import accuracy_figure, save_figure
from utils.results import summarise, table, write_results
from utils.run import Run, log_to_terminal
from utils.scorer import Scorer, scorer

log = logging.getLogger("anml")


def search(
    args: argparse.Namespace, run: Run, score: Scorer, models: list[Model], classes: int
) -> list[Trial]:
    """Every rate of `--lrs` on each of `--lr_search_runs` draws of `classes` classes for each model."""
    trials = []
    total = len(models) * args.lr_search_runs * len(args.lrs)
    with run.progress(total, every=len(args.lrs), unit="try") as bar:
        for position, model in enumerate(models):
            for draw in range(args.lr_search_runs):
                for lr in args.lrs:
                    found = score("search", position, classes, draw, lr)
                    trials.append(Trial(draw, lr, found, model.name))
                    if bar.advance(test=found.test, train=found.train):
                        bar.report()
    return trials


def evaluate(
    args: argparse.Namespace, run: Run, score: Scorer, models: list[Model], about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Search and report each class count of `--schedule`; results are written after each."""
    rows: list[dict[str, Any]] = []
    about |= {"lr_chosen": how_chosen(args, len(models)), "search": []}
    for classes in args.schedule:
        lr = args.lr
        if lr is None:
            trials = search(args, run, score, models, classes)
            lr = best_rate(trials, "test" if args.test else "train")
            about["search"] += [
                {"model": t.model, "classes": classes, "draw": t.draw, "lr": t.lr, **t.score._asdict()}
                for t in trials
            ]
        scores = []
        with run.progress(len(models) * args.runs, every=args.runs, unit="run") as bar:
            for position, model in enumerate(models):
                for draw in range(args.runs):
                    found = score("report", position, classes, draw, lr)
                    row = {"model": model.name, "classes": classes, "run": draw, "lr": lr}
                    scores.append({**row, **found._asdict()})
                    run.metrics(scores[-1])
                    if bar.advance(test=found.test, train=found.train):
                        bar.report()
        rows += scores
        (line,) = summarise(scores)
        for key in ("test", "train"):
            run.scalars(classes, {f"meta_test/accuracy_{key}": line[key]})
        run.scalars(classes, {"meta_test/lr": lr, "meta_test/classes_above_chance": line["above_chance"]})
        write_results(run.folder, rows, about)
    return rows


def main() -> None:
    args = parse(evaluation_parser())
    log_to_terminal()
    device = choose_device(args.device, args.threads)
    models = load_models(args, device)
    net = models[0].net
    if args.rln is None:
        args.rln = net.rln_meta_test
    trained_parameters(net, args.rln)  # a wrong rln is an error now, not after the data is read
    outputs = net.head.out_features
    images, data = load_pool(args, "evaluation", args.test_classes, outputs, device)
    pools = {"evaluation": images}
    if args.lr is None and args.lr_search_split == "background":
        pools["background"], searched = load_pool(args, "background", None, outputs, device)
        data |= {f"search_{key}": value for key, value in searched.items()}
    longest = max(args.schedule)
    for pool in pools.values():
        if longest > len(pool):
            raise UserError(f"--schedule asks for {longest} classes; there are {len(pool)}")
    if args.resume is not None:
        models = match_earlier(models, data, args.resume)
    kind = (type(net).__name__, models[0].weights, args.rln)
    reset = args.reset and not args.scratch
    about = {
        "treatment": describe(*kind, iid=args.iid, epochs=args.epoch, reset=reset),
        "network": type(net).__name__,
        "rln": args.rln,
        "models": [model.about() for model in models],
        "device": str(device),
        **data,
    }
    if args.resume is None:
        run = Run.create(args.runs_dir, args.name, args, about)
    else:
        run = Run.resume(args.resume, args, 0, about)
    with run, Journal(run.folder / "scores.csv") as journal:
        log.info("run folder %s, device %s", run.folder, device)
        log.info("to go on after an interruption: --resume %s", run.folder)
        log.info("treatment %s: --rln %d", about["treatment"], args.rln)
        score = scorer(args, run, journal, models, pools)
        rows = evaluate(args, run, score, models, {**about, "arguments": recorded(args)})
        figure = accuracy_figure(summarise(rows))
        save_figure(figure, run.folder / "accuracy.png")
        run.figure("meta_test/accuracy", figure, max(args.schedule))
        log.info("%s", how_chosen(args, len(models)))
        log.info("%s", table(rows))
        log.info("results.csv, results.json and accuracy.png are in %s", run.folder)


def how_chosen(args: argparse.Namespace, models: int) -> str:
    """One line on where the learning rates come from, so that nobody reads a leak as a result."""
    if args.lr is not None:
        return f"learning rate {args.lr:g} as given"
    pool = "the meta-test classes themselves, as released"
    if args.lr_search_split == "background":
        pool = "meta-training classes, none of those reported on"
    draws = f"{args.lr_search_runs} draws" + (f" for each of {models} models" if models > 1 else "")
    accuracy = f"meta-test {'test' if args.test else 'train'} accuracy"
    rates = f"of {len(args.lrs)} from {min(args.lrs):g} to {max(args.lrs):g}, the one that wins most draws"
    return f"learning rates chosen by {accuracy} on {draws} of {pool}; {rates}"


if __name__ == "__main__":
    run_script(main)
