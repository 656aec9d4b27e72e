# When the time is nearly up (USR1) the tasks are asked to save, and the job is queued again to go on from there; so it is
# when the scheduler takes the nodes for another job, and has told the tasks.
# The tasks get their TERM from scancel: srun kills them at once when it gets one itself.
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
nearly_up=no
trap 'nearly_up=yes; scancel --signal=TERM "$job"' USR1
trap : TERM # the tasks get it as well, and this waits for them

"${command[@]}" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ended the wait
  code=0
  wait "$step" || code=$?
done

preempted() { scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; }
if [ "$requeue" = yes ] && { [ "$nearly_up" = yes ] || preempted; }; then
  scontrol requeue "$job"
fi
exit "$code"
