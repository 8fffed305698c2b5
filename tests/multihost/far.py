"""``python -m tests.multihost.far PORT HOST SECONDS``: what comes to PORT goes to that of HOST, so much later.

There is no netem in the kernels that this has to run on. Ends with its standard input.
"""

import sys

from benchmarks.harness.proxy import Proxy

if __name__ == "__main__":
    _, port, host, seconds = sys.argv
    with Proxy("", int(port)) as proxy:
        proxy.delay = float(seconds)
        proxy.toward(int(port), host)
        sys.stdout.write("passes on\n")
        sys.stdout.flush()
        sys.stdin.read()
