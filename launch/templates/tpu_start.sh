# On every host: the run begins in the background, where it stays when this connection ends.
set -eu
cd "$HOME/llm_jax"
if [ -e run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; then
  echo "a run is going on here already" >&2
  exit 3
fi
rm -f run.code
printf '%s\n' "$*" >run.command
CODE_FILE=run.code PYTHONUNBUFFERED=1 setsid nohup bash launch/templates/until_stopped.sh "$@" >run.log 2>&1 </dev/null &
echo "$!" >run.pid
