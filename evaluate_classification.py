"""Meta-test a model: learn classes it has never seen, one after the other, and measure what remains.

    python evaluate_classification.py --rln 0 --model Neuromodulation_Model.net --name Omni_test_traj \
        --runs 10                                                            # as released: all layers learn
    python evaluate_classification.py --model Neuromodulation_Model.net         # the paper's: head only
    python evaluate_classification.py --model M.net --schedule 10 100 --lr 0.001 --runs 3   # a quick look
    python evaluate_classification.py --scratch --iid --epoch 20                # Scratch-Oracle

Per class count: search the learning rate, then report `--runs` fresh draws at it.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch

from datasets import load_characters
from model.meta_test import MetaTest, Trial, best_rate
from model.modelfactory import Network, build, restore
from utils.arguments import evaluation_parser, parse, recorded
from utils.checkpoint import load_checkpoint
from utils.device import choose_device
from utils.errors import UserError, run_script
from utils.plots import accuracy_figure, save_figure
from utils.results import summarise, table, write_results
from utils.run import Run, log_to_terminal

log = logging.getLogger("anml")


def network(args: argparse.Namespace) -> Network:
    """The network to test: that of `--model`, or without one a new network for `--scratch`."""
    if args.model is None:
        widths = {"pln_channels": args.pln_channels, "num_classes": args.num_classes}
        if args.treatment == "ANML":
            widths["nm_channels"] = args.nm_channels
        return build(args.treatment, widths, torch.Generator().manual_seed(args.seed))
    saved = load_checkpoint(args.model)
    log.info("%s: %s after %d meta-steps", args.model, saved.network, saved.step)
    return restore(saved.network, saved.widths, saved.state_dict, str(args.model))


def load_images(
    args: argparse.Namespace, split: str, net: Network, device: torch.device
) -> tuple[torch.Tensor, dict[str, str]]:
    """Images of the classes that draws are made from, and what `config.json` says of them."""
    characters = load_characters(args.dataset, split, args.dataset_path, args.cache_dir, args.glyph_seed)
    present, outputs = len(characters.characters), net.head.out_features
    limit = args.test_classes if split == "evaluation" else min(present, outputs)
    if limit > present:
        raise UserError(f"--test_classes {limit}: {characters.name} has {present} classes")
    if limit > outputs:
        raise UserError(
            f"the model has {outputs} outputs, too few for {limit} classes of {characters.name}; "
            "lower --test_classes"
        )
    about = {"data": characters.name, "manifest": characters.manifest}
    return characters.normalised(device)[:limit], about


def search(args: argparse.Namespace, run: Run, meta_test: MetaTest, classes: int) -> list[Trial]:
    """Every rate of `--lrs` on each of `--lr_search_runs` draws of `classes` classes."""
    trials = []
    with run.progress(args.lr_search_runs * len(args.lrs), every=len(args.lrs), unit="try") as bar:
        for draw in range(args.lr_search_runs):
            for lr in args.lrs:
                score = meta_test.score(classes, lr, "search", draw)
                trials.append(Trial(draw, lr, score))
                if bar.advance(test=score.test, train=score.train):
                    bar.report()
    return trials


def evaluate(
    args: argparse.Namespace, run: Run, report: MetaTest, choose: MetaTest, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """Search and report each class count of `--schedule`; results are written after each."""
    rows: list[dict[str, Any]] = []
    about["search"] = []
    objective = "test" if args.test else "train"
    for classes in args.schedule:
        lr = args.lr
        if lr is None:
            trials = search(args, run, choose, classes)
            lr = best_rate(trials, objective)
            about["search"] += [
                {"classes": classes, "draw": t.draw, "lr": t.lr, **t.score._asdict()} for t in trials
            ]
        scores = []
        with run.progress(args.runs, every=args.runs, unit="run") as bar:
            for draw in range(args.runs):
                score = report.score(classes, lr, "report", draw)
                scores.append({"classes": classes, "run": draw, "lr": lr, **score._asdict()})
                run.metrics(scores[-1])
                if bar.advance(test=score.test, train=score.train):
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
    net = network(args).to(device)
    if args.rln is None:
        args.rln = net.rln_meta_test
    options = {
        "epochs": args.epoch,
        "iid": args.iid,
        "reset_all": args.reset or args.scratch,
        "class_order": args.class_order,
        "split": args.split,
    }
    images, about = load_images(args, "evaluation", net, device)
    report = choose = MetaTest(net, images, args.rln, args.seed, **options)
    if args.lr is None and args.lr_search_split == "background":
        background, _ = load_images(args, "background", net, device)
        choose = MetaTest(net, background, args.rln, args.seed, **options)
    longest = max(args.schedule)
    for meta_test in (report, choose):
        if longest > len(meta_test.images):
            raise UserError(f"--schedule asks for {longest} classes; there are {len(meta_test.images)}")
    about |= {"device": str(device), "network": type(net).__name__, "rln": args.rln}
    with Run.create(args.runs_dir, args.name, args, about) as run:
        log.info("run folder %s, device %s", run.folder, device)
        log.info("trained at meta-test: --rln %d", args.rln)
        rows = evaluate(args, run, report, choose, {**about, "arguments": recorded(args)})
        figure = accuracy_figure(summarise(rows))
        save_figure(figure, run.folder / "accuracy.png")
        run.figure("meta_test/accuracy", figure, max(args.schedule))
        log.info("%s", how_chosen(args))
        log.info("%s", table(rows))
        log.info("results.csv, results.json and accuracy.png are in %s", run.folder)


def how_chosen(args: argparse.Namespace) -> str:
    """One line on where the learning rates come from, so that nobody reads a leak as a result."""
    if args.lr is not None:
        return f"learning rate {args.lr:g} as given"
    pool = "the meta-test classes themselves, as released"
    if args.lr_search_split == "background":
        pool = "meta-training classes, none of those reported on"
    return (
        f"learning rates chosen by meta-test {'test' if args.test else 'train'} accuracy on draws of {pool}"
    )


if __name__ == "__main__":
    run_script(main)
