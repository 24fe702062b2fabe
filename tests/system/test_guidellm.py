"""guidellm against a real cluster: no request fails, and both sides count the same tokens."""

import json
import re
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from support.clients import run_client
from support.processes import TINY_MODEL, serving

REQUESTS, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 24, 4, 48, 16


def test_a_benchmark_of_streamed_completions_has_no_error_and_the_servers_counts(
    tmp_path: Path,
) -> None:
    report = tmp_path / "report.json"
    data = f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"
    with serving("--expert-devices", "2", "--ep-size", "2") as (running, _):
        (url,) = re.findall(r"(http://127\.0\.0\.1:\d+) \(HTTP\)", "\n".join(running.out))
        run_client(
            *("guidellm", "run", "--data", data, "--tokenizer", f"kind=hf_auto,model={TINY_MODEL}"),
            "--backend",
            f"kind=openai_http,target={url},model=tiny_model,request_format=/v1/completions",
            *("--profile", f"kind=concurrent,streams={STREAMS}"),
            *("--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--output", f"kind=json,path={report}", "--disable-console"),
            directory=tmp_path,
        )
        counted = _counters(url)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert requests["errored"] == []
    successful = requests["successful"]
    assert len(successful) == REQUESTS
    assert {each["output_tokens"] for each in successful} == {OUTPUT_TOKENS}
    assert counted["epserve_generation_tokens_total"] == REQUESTS * OUTPUT_TOKENS
    prompt_tokens = sum(each["prompt_tokens"] for each in successful)
    assert counted["epserve_prompt_tokens_total"] == prompt_tokens
    assert counted["epserve_request_success_total"] == REQUESTS


def _counters(url: str) -> dict[str, float]:
    """The sums of the gateway's own counters over their labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    sums: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums
