"""--grader code_grader.py:passes: whether the answer's Python code passes the row's tests."""

import re
import subprocess
import sys


def passes(row, response):
    blocks = re.findall(r"```python\n(.*?)```", response, re.DOTALL)
    if not blocks:
        return False
    program = blocks[-1] + "\n" + row["test"]
    try:
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=5)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
