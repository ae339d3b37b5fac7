"""Runs vLLM on prompts in a process of its own; prints nothing, writes what it generated.

usage: python engine_run.py job.json result.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(job_file: str, result_file: str) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    llm = LLM(seed=0, dtype="float32", disable_log_stats=True, **job["engine"])
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=job["max_tokens"])
    generated = []
    for prompts in job["rounds"]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        generated += [
            {
                "prompt": list(output.prompt_token_ids),
                "output": list(output.outputs[0].token_ids),
                "cached": output.num_cached_tokens,
            }
            for output in outputs
        ]
    Path(result_file).write_text(json.dumps(generated))


if __name__ == "__main__":
    main(*sys.argv[1:])
