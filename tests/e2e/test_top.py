"""`epserve top` of a cluster that is there, and of one that is not."""

import signal

from support.processes import epserve, serving, started


def test_top_prints_frames_and_ends_well_when_interrupted():
    with serving("--kv-cache-tokens", "1024") as (_, target):
        generated = epserve("generate", "--target", target, "--prompt", "The", "--max-tokens", "4")
        assert generated.returncode == 0, generated.stderr
        once = epserve("top", "--target", target, "--once")
        assert (once.returncode, once.stderr) == (0, "")
        assert once.stdout.count("placement epoch 0") == 1
        for words in ("attn 0", "expert 0", "Attention groups", "Links, the busiest first"):
            assert words in once.stdout
        assert "\x1b" not in once.stdout
        with started("top", "--target", target) as running:
            for _ in range(2):
                running.wait_for("placement epoch 0")
            running.send(signal.SIGINT)
            assert running.wait() == 0
            assert running.err == []


def test_top_without_a_gateway_is_one_line_and_status_1():
    failed = epserve("top", "--target", "127.0.0.1:1")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.count("\n") == 1
    assert "127.0.0.1:1" in failed.stderr
