"""How property tests run: the same examples every time, however slow the machine is just now."""

from hypothesis import HealthCheck, settings

patient = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
