"""Train `models/visualglm-tiny` from scratch on the drawings of `tiny_world.py`, and measure what it has learned.

    python -m tools.tiny --output models/visualglm-tiny
    python -m tools.tiny --output models/visualglm-tiny --evaluate
    python -m tools.tiny --output models/visualglm-tiny --refresh

The eyes come first: for `--vision-steps` steps only the image encoder learns, by answering simple questions through
linear heads that are thrown away afterwards. Then the whole model learns to answer in words; the loss is taken on the
answer and its `<eop>` alone. A run that was stopped goes on from its last checkpoint.

This door parses options; the work is in `tiny_training.py`.
"""

import argparse
import json


# torch, transformers and what is built on them are imported in `main`: `-h` and typing errors shall not wait for them.


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="models/visualglm-tiny", help="folder of the model")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --output")
    parser.add_argument("--refresh", action="store_true", help="only copy today's code beside the weights in --output")
    parser.add_argument("--card", action="store_true", help="write the measured accuracy into the model card")
    parser.add_argument("--pictures", type=int, default=200, help="pictures per split in the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--vision-steps", type=int, default=2500, help="steps for the image encoder alone, of --steps")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--exam-weight", type=float, default=0.3, help="of the exam in the second phase")
    parser.add_argument("--threads", type=int, default=1, help="for the model; drawing has a process of its own")
    return parser.parse_args()


def main() -> None:
    """Train and measure, or only measure."""
    options = parse_options()
    import torch

    from tools.tiny.training import evaluate, refresh, train, write_card

    torch.set_num_threads(options.threads)
    if options.refresh:
        refresh(options)
        return
    if not options.evaluate:
        train(options)
    results = evaluate(options)
    if options.card or not options.evaluate:
        write_card(options, results)
    print(json.dumps(results, ensure_ascii=False))


if __name__ == "__main__":
    main()
