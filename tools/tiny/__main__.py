"""Train `models/visualglm-tiny` from scratch on the drawings of `tools/tiny/world.py`, and measure what it has learned.

    python -m tools.tiny --output models/visualglm-tiny
    python -m tools.tiny --output models/visualglm-tiny --evaluate
    python -m tools.tiny --output models/visualglm-tiny --refresh

The eyes come first: for --vision-steps steps only the image encoder learns, by answering simple questions through
linear heads that are thrown away afterwards. Then the whole model learns to answer in words; the loss is taken on the
answer and its <eop> alone. A run that was stopped goes on from its last checkpoint.
"""

import json
import sys
from collections.abc import Sequence

from tools.tiny.options import Options
from visualglm_tools.__main__ import INTERRUPTED
from visualglm_tools.options import parse
from visualglm_tools.printing import report


# torch, transformers and what is built on them are imported in `run`: `-h` and typing errors shall not wait for them.


def run(options: Options) -> None:
    """Train and measure, or only measure, or only renew what stands beside the weights."""
    import torch

    from tools.tiny.card import write_card
    from tools.tiny.exam import evaluate
    from tools.tiny.folder import refresh
    from tools.tiny.train import train

    torch.set_num_threads(options.threads)
    if options.task == "refresh":
        refresh(options.output)
        return
    if options.task == "train":
        train(options)
    results = evaluate(options)
    if options.card or options.task == "train":
        write_card(options.output, results)
    print(json.dumps(results, ensure_ascii=False))


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(Options, argv, "python -m tools.tiny", __doc__)
    try:
        run(options)
    except (ValueError, OSError) as error:
        report(error)
        return 2
    except KeyboardInterrupt:  # the same command goes on from the last checkpoint
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
