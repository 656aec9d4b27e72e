#!/bin/bash
# Runs a command. A TERM goes on to it, so that it saves; the exit code then is 143 whatever its own, so that what was
# stopped is not taken for what has ended. CODE_FILE, where it is set, names a file that the code is written to.
stopped=no child=
tell() {
  stopped=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
}
trap tell TERM

"$@" </dev/null &
child=$!
[ "$stopped" = no ] || tell # it came in between
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # a signal ended the wait
  code=0
  wait "$child" || code=$?
done

[ "$stopped" = no ] || code=143
[ -z "${CODE_FILE:-}" ] || echo "$code" >"$CODE_FILE"
exit "$code"
