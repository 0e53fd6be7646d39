"""--grader json_grader.py:score: the share of the wanted keys that the answer's JSON has right."""

import json


def score(row, response):
    start, end = response.find("{"), response.rfind("}")
    try:
        found = json.loads(response[start : end + 1])
    except ValueError:
        return 0
    wanted = json.loads(row["answer"])
    return sum(found.get(key) == value for key, value in wanted.items()) / len(wanted)
