"""stub"""

from reap_serve.compare.record import Report
from reap_serve.plan.record import Plan


def report_page(report: Report, plan: Plan | None = None) -> str | None:
    """stub"""
    return None
