"""The alert rules, run by Prometheus' promtool on series as the exporters write them."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.k8s.support.promtool import RULES, evaluate, read_dashboard, run_promtool

HOUR, DAY = 60, 1440  # in minutes, with one sample per minute
CRON = '{namespace="sightline", cronjob="nightly"}'
JOB = 'namespace="sightline", job_name="nightly-%d"'
ENDPOINT = 'name="endpoint", namespace="sightline", uid="u"'


def check_alerts(folder: Path, series: dict[str, str], alerts: dict[str, dict[int, bool]]) -> None:
    """Check which alerts fire, at minutes since the series' start. Each series has one sample per minute."""
    rules = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    queries = []
    for name, times in alerts.items():
        assert name in rules
        for minute, fires in times.items():
            # ALERTS has the labels of the alert. `count` drops them, so the query tells only whether the alert fires.
            query = f'count(ALERTS{{alertname="{name}", alertstate="firing"}})'
            expected = [{"labels": "{}", "value": 1}] if fires else []
            queries.append({"expr": query, "eval_time": f"{minute}m", "exp_samples": expected})
    evaluate(folder, series, queries)


def test_the_rules_are_valid() -> None:
    done = run_promtool("check", "rules", str(RULES))
    assert done.returncode == 0, done.stderr


def test_an_endpoint_that_is_down_fires(tmp_path: Path) -> None:
    ready = f'kuberay_service_condition_ready{{{ENDPOINT}, condition="%s"}}'
    series = {ready % "true": "1x20 _x40 1x30", ready % "false": "_x21 1x39 _x30"}
    check_alerts(tmp_path, series, {"SightlineEndpointDown": {15: False, 35: True, 80: False}})


def test_a_missing_operator_fires(tmp_path: Path) -> None:
    check_alerts(tmp_path, {"up": "1x60"}, {"SightlineEndpointDown": {3: False, 10: True}})


def test_a_stuck_upgrade_fires(tmp_path: Path) -> None:
    name = f'kuberay_service_condition_upgrade_in_progress{{{ENDPOINT}, condition="true"}}'
    check_alerts(tmp_path, {name: "_x9 1x100 _x30"}, {"SightlineUpgradeStuck": {60: False, 80: True, 130: False}})


def test_it_fires_if_no_night_has_ever_succeeded(tmp_path: Path) -> None:
    series = {f"kube_cronjob_created{CRON}": f"0x{3 * DAY}"}
    check_alerts(tmp_path, series, {"SightlineNightMissing": {35 * HOUR: False, 37 * HOUR: True}})


def test_a_missing_night_fires_until_one_succeeds(tmp_path: Path) -> None:
    series = {
        f"kube_cronjob_created{CRON}": f"0x{3 * DAY}",
        f"kube_cronjob_status_last_successful_time{CRON}": f"_x{2 * HOUR} {HOUR * 60}x{2 * DAY} {50 * HOUR * 60}x{DAY}",
    }
    check_alerts(tmp_path, series, {"SightlineNightMissing": {36 * HOUR: False, 38 * HOUR: True, 55 * HOUR: False}})


def test_a_failed_night_fires_until_one_succeeds(tmp_path: Path) -> None:
    """The failed Job stays in the history long after a success. The submitter's Jobs of a run do not count."""
    failed, later, try_ = JOB % 60, JOB % 1500, 'namespace="sightline", job_name="nightly-1500-1"'
    success = f"kube_cronjob_status_last_successful_time{CRON}"
    series = {
        f"kube_cronjob_created{CRON}": f"0x{3 * DAY}",
        f"kube_job_status_start_time{{{failed}}}": f"_x{HOUR - 1} {HOUR * 60}x{2 * DAY}",
        f'kube_job_failed{{{failed}, condition="true"}}': f"_x{2 * HOUR - 1} 1x{2 * DAY}",
        f"kube_job_status_start_time{{{later}}}": f"_x{25 * HOUR - 1} {25 * HOUR * 60}x{DAY}",
        f'kube_job_failed{{{later}, condition="true"}}': f"_x{25 * HOUR - 1} 0x{DAY}",
        f"kube_job_status_start_time{{{try_}}}": f"_x{27 * HOUR - 1} {27 * HOUR * 60}x{DAY}",
        f'kube_job_failed{{{try_}, condition="true"}}': f"_x{27 * HOUR - 1} 1x{DAY}",
        success: f"_x{26 * HOUR - 1} {26 * HOUR * 60}x{DAY}",
    }
    times = {HOUR: False, 3 * HOUR: True, 25 * HOUR: True, 27 * HOUR: False, 28 * HOUR: False}
    check_alerts(tmp_path, series, {"SightlineNightFailed": times})


def test_pending_pods_fire(tmp_path: Path) -> None:
    pod = 'kube_pod_status_phase{namespace="sightline", pod="nightly-1-1-actors-x", phase="%s"}'
    series = {pod % "Pending": "1x60 0x60", pod % "Running": "0x60 1x60"}
    check_alerts(
        tmp_path, series, {"SightlinePodPending": {40: False, 50: True, 70: False}, "SightlineNoCommit": {50: False}}
    )


def test_health_checks_do_not_lower_the_ratios(tmp_path: Path) -> None:
    """2 % of the requests fail, and requests take 1.5 s on average. There are ten times as many health checks."""
    of = 'application="sightline", deployment="ingress", replica="r"'
    series = {
        f'ray_sightline_requests_total{{{of}, route="/readyz", status="200", code=""}}': "0+1000x60",
        f'ray_sightline_request_seconds_total{{{of}, route="/readyz"}}': "0+1x60",
        f'ray_sightline_requests_total{{{of}, route="/v1/embeddings", status="200", code=""}}': "0+96x60",
        f'ray_sightline_requests_total{{{of}, route="/v1/embeddings", status="500", code="internal"}}': "0+2x60",
        f'ray_sightline_requests_total{{{of}, route="/v1/embeddings", status="429", code="overloaded"}}': "0+2x60",
        f'ray_sightline_request_seconds_total{{{of}, route="/v1/embeddings"}}': "0+150x60",
    }
    check_alerts(
        tmp_path, series, {name: {30: True} for name in ("SightlineErrors", "SightlineQueueFull", "SightlineSlow")}
    )


def test_a_healthy_endpoint_and_run_fire_nothing(tmp_path: Path) -> None:
    of = 'application="sightline", deployment="ingress", replica="r"'
    run_labels = 'ray_io_cluster="nightly-1-1-x"'
    series = {
        f'ray_sightline_requests_total{{{of}, route="/v1/embeddings", status="200", code=""}}': "0+1000x60",
        f'ray_sightline_request_seconds_total{{{of}, route="/v1/embeddings"}}': "0+50x60",
        f"ray_sightline_run_last_commit_seconds{{{run_labels}}}": "0+60x60",
        f"ray_sightline_run_rows{{{run_labels}}}": "0+50000x60",
        f"ray_sightline_run_rejects{{{run_labels}}}": "0+500x60",
        f'kuberay_service_condition_ready{{{ENDPOINT}, condition="true"}}': "1x60",
    }
    rules = [rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    check_alerts(tmp_path, series, {name: {30: False, 60: False} for name in rules})


def test_the_dashboards_queries_are_valid_promql(tmp_path: Path) -> None:
    rules = [{"record": f"q{number}", "expr": query} for number, query in enumerate(read_dashboard())]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = run_promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stderr
