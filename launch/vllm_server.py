#!/usr/bin/env python
"""Start the vLLM server that a recipe's `rollout.server` names, on GPUs that the training does not use:

    CUDA_VISIBLE_DEVICES=7 python launch/vllm_server.py recipe.yaml
    CUDA_VISIBLE_DEVICES=6,7 python launch/vllm_server.py recipe.yaml --tensor-parallel-size 2
    python launch/vllm_server.py recipe.yaml --print            # only say what would be run

Key=value pairs override the recipe, as for `po train`; give both the same. Everything else goes to `vllm serve`. The
server begins with the base model's weights; the training sends its own before the first sample. Needs vLLM
(pip install vllm; TRL's client takes 0.22 to 0.31), here and where the training runs.
"""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's po, before an installed one

from po.errors import POError, UserError
from po.recipe import load
from po.rollout.sampler import Sampling
from po.rollout.vllm import logprobs_mode
from po.spec import Recipe


def command(recipe: Recipe) -> list[str]:
    """What serves the recipe's model as po's sampler expects it."""
    model, rollout = recipe.model, recipe.rollout
    if rollout is None or rollout.server is None:
        raise UserError("rollout.server: the recipe names no server; write e.g. `server: http://localhost:8000`")
    if model.load_in_4bit:
        raise UserError("model.load_in_4bit: 4-bit weights cannot be sent to vLLM; leave rollout.server out")
    address = urlsplit(rollout.server)
    sampling = Sampling(rollout.max_completion_length, rollout.temperature, rollout.top_p, rollout.top_k)
    local = address.hostname in ("localhost", "127.0.0.1")  # whoever reaches the server may change its weights
    host = "127.0.0.1" if local else "0.0.0.0"
    out = ["vllm", "serve", model.name_or_path, "--host", host, "--port", str(address.port or 80)]
    out += ["--dtype", model.dtype, "--max-model-len", str(recipe.data.max_length)]
    out += ["--revision", model.revision] if model.revision else []
    out += ["--tokenizer", model.tokenizer] if model.tokenizer else []
    out += ["--trust-remote-code"] if model.trust_remote_code else []
    out += ["--generation-config", "vllm"]  # no defaults of the model's own, nor its limit on new tokens
    out += ["--logprobs-mode", logprobs_mode(sampling)]
    return [*out, "--weight-transfer-config", json.dumps({"backend": "nccl"})]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    only_print = "--print" in arguments
    overrides = [a for a in arguments[1:] if re.match(r"[A-Za-z_][\w.]*=", a)]
    further = [a for a in arguments[1:] if a not in overrides and a != "--print"]
    try:
        recipe, notes = load(arguments[0], overrides)
        run = command(recipe) + further
    except POError as e:
        print(e, file=sys.stderr)
        return e.exit_code
    for note in notes:
        print(note, file=sys.stderr)
    print(f"VLLM_SERVER_DEV_MODE=1 {shlex.join(run)}", flush=True)
    if only_print:
        return 0
    if shutil.which("vllm") is None:
        print("there is no `vllm` here; pip install vllm, in an environment with a GPU", file=sys.stderr)
        return 2
    os.execvpe("vllm", run, os.environ | {"VLLM_SERVER_DEV_MODE": "1"})  # the endpoints that take weights


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
