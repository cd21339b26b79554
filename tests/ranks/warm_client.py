"""The executable of `warm.py`: asks a server for a fork, passes signals on, ends as the fork ends.

It imports little, since each start of a warm Python waits for it.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1)

folder, *arguments = sys.argv[1:]
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.connect(f"{folder}/{'0' if os.environ.get('MLX_RANK', '0') == '0' else '1'}")
request = json.dumps([arguments, dict(os.environ), os.getcwd()])
socket.send_fds(link, [request.encode()], [0, 1, 2])
pid = int(link.recv(16))
for number in PASSED_ON:
    signal.signal(number, lambda number, _: os.kill(pid, number))
status = int(link.recv(16) or signal.SIGKILL)
for number in PASSED_ON:
    signal.signal(number, signal.SIG_DFL)
if os.WIFSIGNALED(status):
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
