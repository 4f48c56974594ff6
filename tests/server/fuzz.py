"""Requests that schemathesis makes up from the service's description; prints failures, then JSON.

    python tests/server/fuzz.py LOCATION EXAMPLES OBJECT

A process of its own: the library brings plugins and settings of pytest and hypothesis along.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter

import hypothesis
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import checks

from logitstore_server.app import create_app
from logitstore_server.settings import ServerSettings


def main() -> int:
    location, examples, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    app = create_app(ServerSettings(stores=(f"s={location}",)), unguarded=True)
    schema = schemathesis.openapi.from_asgi("/v1/openapi.json", app)
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    chosen = [
        checks.not_a_server_error,
        *checks.CHECKS.get_by_names(
            [
                "status_code_conformance",
                "content_type_conformance",
                "response_headers_conformance",
                "response_schema_conformance",
            ]
        ),
    ]
    statuses: Counter[int] = Counter()

    def test_of(operation):
        draws = random.Random(0)

        @settings
        @hypothesis.given(case=operation.as_strategy())
        def ask(case):
            # Most requests are for what is there.
            if "store" in case.path_parameters and draws.random() < 0.7:
                case.path_parameters["store"] = "s"
            if "name" in case.path_parameters and draws.random() < 0.5:
                case.path_parameters["name"] = name
            answer = case.call()
            statuses[answer.status_code] += 1
            case.validate_response(answer, checks=chosen)

        return ask

    failures = operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        operations += 1
        try:
            test_of(operation)()
        except Exception as error:
            failures += 1
            print(f"{operation.label}: {error}")
    told = {
        "operations": operations,
        "requests": statuses.total(),
        "server_errors": sum(count for status, count in statuses.items() if status >= 500),
        "failures": failures,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
    }
    print(json.dumps(told))
    return 1 if failures or not statuses else 0


if __name__ == "__main__":
    sys.exit(main())
