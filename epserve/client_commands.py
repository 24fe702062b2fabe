"""The commands that ask a running cluster: `epserve generate`, `status` and `top`.

Knows their options. What they do is in a module that is imported when one of them runs.
"""

from typing import Annotated

import typer

from epserve import generate_options as g
from epserve.options import common, network, security
from moe_core.errors import ConfigError, EpserveError


def generate(
    target: network.TargetOption = network.DEFAULT_TARGET,
    prompt: g.PromptOption = None,
    prompt_ids: g.PromptIdsOption = None,
    max_tokens: g.MaxTokensOption = None,
    temperature: g.TemperatureOption = None,
    top_p: g.TopPOption = None,
    top_k: g.TopKOption = None,
    min_p: g.MinPOption = None,
    seed: g.SeedOption = None,
    stop: g.StopOption = None,
    stop_token_ids: g.StopTokenIdsOption = None,
    ignore_eos: g.IgnoreEosOption = False,
    repetition_penalty: g.RepetitionPenaltyOption = None,
    presence_penalty: g.PresencePenaltyOption = None,
    frequency_penalty: g.FrequencyPenaltyOption = None,
    logprobs: g.LogprobsOption = None,
    prompt_logprobs: g.PromptLogprobsOption = None,
    logit_bias: g.LogitBiasOption = None,
    min_tokens: g.MinTokensOption = None,
    n: g.NumChoicesOption = None,
    tls_ca: security.TlsCaOption = None,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    api_key: security.ApiKeyOption = None,
    json: common.JsonOption = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Generate completions of a prompt, printed as they come."""
    from epserve.gateway_connection import Target
    from epserve.generate import generate as run_generate
    from epserve.generate_messages import Sampling

    if (prompt is None) == (prompt_ids is None):
        raise ConfigError("prompt", prompt, "give exactly one of --prompt and --prompt-ids")
    for name, count in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        if count is not None and not json:
            raise ConfigError(name, count, "is shown with --json only; add it")
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
        stop_token_ids=g.token_ids("stop_token_ids", stop_token_ids),
        ignore_eos=ignore_eos,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logprobs=logprobs,
        logit_bias=g.logit_bias(logit_bias or ()),
        min_tokens=min_tokens,
        n=n,
        prompt_logprobs=prompt_logprobs,
    )
    ids = g.token_ids("prompt_ids", prompt_ids)
    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    finished = run_generate(gateway, ids if prompt is None else prompt, sampling, as_json=json)
    if not finished:
        raise EpserveError("interrupted")


def status(
    target: network.TargetOption = network.DEFAULT_TARGET,
    tls_ca: security.TlsCaOption = None,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    api_key: security.ApiKeyOption = None,
    json: common.JsonOption = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Show a cluster's processes and links."""
    from epserve.gateway_connection import Target
    from epserve.status import status as run_status

    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    run_status(gateway, as_json=json)


def top(
    target: network.TargetOption = network.DEFAULT_TARGET,
    tls_ca: security.TlsCaOption = None,
    tls_cert: security.TlsCertOption = None,
    tls_key: security.TlsKeyOption = None,
    api_key: security.ApiKeyOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    config: common.ConfigOption = None,
    dump_config: common.DumpConfigOption = False,
    debug: common.DebugOption = False,
) -> None:
    """Watch a cluster: load, rates and hot experts, once a second."""
    from epserve.gateway_connection import Target
    from epserve.top import top as run_top

    gateway = Target.of_options(target, tls_ca, tls_cert, tls_key, api_key)
    run_top(gateway, once=once)
