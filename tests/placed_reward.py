"""A reward that notes where it was called: the processes, and the engine that accelerate chose for them."""

import json
import os
from pathlib import Path

from accelerate.state import AcceleratorState


def share_of_digits(completions, **_):
    state = AcceleratorState()
    plugin = state.deepspeed_plugin if state.distributed_type.value == "DEEPSPEED" else None
    seen = dict(
        processes=state.num_processes,
        engine=state.distributed_type.value,
        zero=plugin.deepspeed_config["zero_optimization"] if plugin else None,
        machine=os.environ.get("GROUP_RANK"),
    )
    (Path(os.environ["PLACED"]) / f"rank_{state.process_index}.json").write_text(json.dumps(seen))
    return [sum(character.isdigit() for character in one) / max(len(one), 1) for one in completions]
