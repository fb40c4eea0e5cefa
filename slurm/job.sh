# What is above differs between jobs; from here on all are alike.
#   0 done | 75 saved, goes on | 2, 78 would fail again: stopped | anything else: a crash, started again within limits

# What a shell or another launcher has left in the environment of the submission is not about this job.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_TIME_FORMAT POSIXLY_CORRECT "${!SQUEUE_@}"
set +o posix
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
id=$job${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
restart=${SLURM_RESTART_COUNT:-0}
logs=$records/logs/$id-$restart
checks=$records/preflight/$id-$restart
counter=$records/crash-loop${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}
starts=$records/starts${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}.jsonl # its own: NFS cannot append from many nodes
stopped=$records/stopped${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}
again="sbatch ${records@Q}/job.sbatch"

say() { TZ=UTC printf '%(%Y-%m-%dT%H:%M:%SZ)T %s\n' -1 "$*"; }

# Training: step of the newest checkpoint. Tokenization: finished chunks. Conversion of a list: those made. It must rise
# for a start to count as one that got somewhere. What writes to a URL, and evaluation, show none.
progress() {
    local most=0 path number
    case $kind in
    train)
        for path in "$run"/step-*/COMPLETE; do
            number=${path%/COMPLETE} number=${number##*/step-}
            if [[ $number =~ ^[0-9]+$ ]] && ((10#$number > most)); then most=$((10#$number)); fi
        done ;;
    tokenize)
        if [[ -d $run/chunks ]]; then most=$(find "$run/chunks" -name '*.json' | wc -l); fi ;;
    convert)
        if [[ -d $run.claims/made ]]; then most=$(find "$run.claims/made" -type f | wc -l); fi ;;
    esac
    echo "$((most))"
}

record() { # EVENT FIELDS
    printf '{"event": "%s", "job": %d, "task": %s, "restart": %d, "time": %(%s)T, "progress": %d, %s}\n' "$1" "$job" \
        "${SLURM_ARRAY_TASK_ID:-null}" "$restart" -1 "$(progress)" "$2" >> "$starts"
}

field() { # NAME: what Slurm says of this job
    scontrol --oneliner show job "$id" 2> /dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}

# Whether somebody took the job away. Slurm ends a job whose time is up or whose node is lost as well, and one that it
# has put back into the queue by itself (preemption, `scontrol requeue`): of that it has counted the restart already.
taken_away() {
    [[ -e $records/cancelled ]] && return 0
    [[ $(field JobState) == @(COMPLETING|CANCELLED*) && $(field Reason) != @(TimeLimit|NodeDown) &&
        $(field PreemptTime) == @(None|) && $(field Restarts) == "$restart" ]]
}

# Back into the queue. A controller that restarts or is busy may take minutes to answer.
requeue() {
    local pause
    for pause in 0 5 15 30 60 60 60; do
        sleep "$pause"
        scontrol requeue "$id" && return
        # where it is in the queue again already, it waits
        [[ $(field JobState) == PENDING || $(field Restarts) -gt $restart ]] && return
    done
    say "error: it could not go back into the queue; start it again: $again"
}

exclude() { # JOB: it gets none of the nodes in $excluded
    local before
    before=$(id=$1 field ExcNodeList) # of the submission
    if [[ $before != @("(null)"|) ]]; then before=$before,; else before=; fi
    scontrol update JobId="$1" ExcNodeList="$before$excluded" || say "error: job $1 may get these nodes: $excluded"
}

# Ends this script. After the decision to go on the job is back in the queue, without the nodes in $excluded.
excluded=
leave() { # CODE DECISION REASON
    trap '' USR2 TERM # Slurm sends TERM to a job that goes back into the queue: what is decided stays
    record end "\"code\": $1, \"decision\": \"$2\""
    say "$3"
    case $2 in
    stop) printf '%s\n' "$3" > "$stopped" ;;
    requeue)
        requeue
        if [[ -n $excluded ]]; then exclude "$id"; fi ;;
    next)
        if [[ -n $excluded ]]; then
            local number jobs
            mapfile -t jobs < <(sed "0,/^$job\$/d" "$records/job-ids")
            for number in "${jobs[@]}"; do
                if [[ $number != "$job" ]]; then exclude "$number"; fi
            done
        fi ;;
    esac
    exit "$1"
}

last_of_chain() {
    local jobs
    mapfile -t jobs < <(uniq "$records/job-ids") # the script of the first may write its number, too
    ((${#jobs[@]} >= chain)) && [[ ${jobs[-1]} == "$job" ]]
}

# Ends this script where the work is neither done nor hopeless.
go_on() { # CODE WHY
    if taken_away; then leave "$1" cancelled "$2: cancelled"; fi
    if ((chain > 1)) && ! last_of_chain; then leave "$1" next "$2: the next job of the chain goes on"; fi
    if ((!requeue)); then leave "$1" left "$2: go on with: $again"; fi
    leave "$1" requeue "$2: back into the queue${excluded:+ without $excluded}"
}

# Starts in a row without progress weigh 10 each, and 1 where they were asked to stop, as often happens to a job that is
# preempted. The weight is written before the start is tried: a node that dies says nothing afterwards.
reached=0
weight=-1
weigh() { # WEIGHT of this start
    printf '%s %s\n' "$reached" "$((weight + $1))" > "$counter.new" && mv "$counter.new" "$counter"
}

count_start() {
    local last=-1
    weight=0
    if [[ -e $counter ]]; then read -r last weight < "$counter"; fi
    reached=$(progress)
    if ((reached > last)); then weight=0; fi
    if ((weight >= 10 * start_limit)); then
        leave 78 stop "stopped: $start_limit starts in a row (asked to stop: ten times as many) ended without progress \
beyond $reached; see \`grn-scale slurm why\`"
    fi
    weigh 10 || leave 1 left "error: $counter cannot be written: free space there, then $again"
}

time_is_up() {
    [[ -n ${SLURM_JOB_END_TIME:-} ]] && (($(date +%s) + signal_seconds + 60 >= SLURM_JOB_END_TIME))
}

# Being asked to stop is no excuse for a start that fails, or that had all its time, where progress can be seen.
settle() { # CODE
    if (($1 == 75)); then weigh 1; fi
    if (($1 == 0 || $(progress) > reached)); then return; fi
    if (($1 != 75)) || { time_is_up && [[ $kind != evaluate && $run != *://* ]]; }; then weigh 10; fi
}

free_port() { # FIRST
    local port=$1
    while (exec 3<> "/dev/tcp/$MASTER_ADDR/$port") 2> /dev/null; do port=$((port + 1)); done
    echo "$port"
}

# srun passes USR2 on to all processes. TERM, which it would end of, comes to this script when Slurm ends the job; at its
# time limit a KILL follows soon. A command substitution in a trap that a second signal interrupts would break the script.
step=
overdue=0
ask_to_stop() {
    asked=1
    say "asked to stop"
    if ((weight >= 0)); then weigh 1; fi
    if [[ -n $step ]]; then kill -USR2 "$step" 2> /dev/null; fi
}
end_is_near() {
    local now
    ask_to_stop
    printf -v now '%(%s)T' -1
    if [[ -n ${SLURM_JOB_END_TIME:-} ]] && ((now + 5 >= SLURM_JOB_END_TIME)); then overdue=1; fi
}
trap ask_to_stop USR2
trap end_is_near TERM

# Runs its arguments to their end, whatever signals come to this shell meanwhile. Where they outlast the job's time, this
# script would be killed with them: it goes on before.
attend() {
    "$@" &
    step=$!
    if ((asked)); then kill -USR2 "$step" 2> /dev/null; fi # it came in between
    while kill -0 "$step" 2> /dev/null; do
        wait "$step"
        if ((overdue)); then
            for _ in {1..4}; do kill -0 "$step" 2> /dev/null && sleep 0.5; done
            if kill -0 "$step" 2> /dev/null; then
                settle 75
                go_on 75 "its time is up, and its processes have not ended"
            fi
        fi
    done
    wait "$step"
    local code=$?
    step=
    return "$code"
}

if [[ -e $records/cancelled ]]; then leave 0 drop "not started: the job was cancelled"; fi
if [[ -e $stopped ]]; then leave 78 drop "not started: $(< "$stopped")"; fi
grep --quiet --line-regexp "$job" "$records/job-ids" 2> /dev/null || echo "$job" >> "$records/job-ids"
count_start
record start "\"nodes\": \"$SLURM_JOB_NODELIST\""
mkdir -p "$logs"

GRN_SCALE_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
MASTER_ADDR=$(scontrol --oneliner show node "${GRN_SCALE_NODES%% *}" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
MASTER_ADDR=${MASTER_ADDR:-${GRN_SCALE_NODES%% *}}
MASTER_PORT=$(free_port $((15000 + SLURM_JOB_ID % 15000)))
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    end=$(squeue --noheader --jobs="$id" --format=%e || { sleep 10; squeue --noheader --jobs="$id" --format=%e; })
    SLURM_JOB_END_TIME=${end:+$(date -d "$end" +%s)} # date takes nothing for midnight
fi
export GRN_SCALE_NODES MASTER_ADDR MASTER_PORT SLURM_JOB_END_TIME
say "start $restart of job $id on $SLURM_JOB_NODELIST; processes meet at $MASTER_ADDR:$MASTER_PORT; logs in $logs"
if [[ -n $lost_module ]]; then
    go_on 1 "error: module load $lost_module failed; correct modules in the cluster file, or exclude the node"
fi

if ((${#preflight[@]})); then
    mkdir -p "$checks"
    attend "${preflight[@]}" --records "$checks"
    fit=$?
    failed=()
    for node in $GRN_SCALE_NODES; do
        if [[ ! -e $checks/$node.ok ]]; then failed+=("$node"); fi
    done
    if ((fit != 0 && !asked)); then
        say "error: preflight failed on ${failed[*]:-no single node}; see $checks"
        # where all of several nodes fail it is no node's fault; of one alone nobody knows, and the start limit ends it
        if ((exclude_failed && ${#failed[@]} && (SLURM_JOB_NUM_NODES == 1 || ${#failed[@]} < SLURM_JOB_NUM_NODES))); then
            printf '%s\n' "${failed[@]}" >> "$records/excluded-nodes"
            excluded=$(sort -u "$records/excluded-nodes" | paste -sd, -)
        fi
        go_on 1 "preflight failed"
    fi
    MASTER_PORT=$(free_port $((MASTER_PORT + 1)))
fi

code=75
if ((!asked)); then
    attend "${launch[@]}" --rank-logs "$logs" -- "${command[@]}"
    code=$?
fi
# srun tells the highest code of all processes, also of those that it ended because another one had saved and was gone,
# torchrun 1 of any. What would come again says more; and where one failed by itself, the others were told to stop, and
# may have saved.
: > "$logs/ended" # a change of one's own makes NFS look at the folder anew
# srun says 0 of a node that fails
if ((code == 0)) && [[ ! -e $logs/exit-0 ]]; then code=1; fi
if [[ -e $logs/exit-75 ]] && ((code == 1 || code > 128)); then code=75; fi
for path in "$logs"/exit-[0-9]*; do
    if [[ -e $path && $path != */exit-0 && $code == 75 ]]; then code=${path##*/exit-}; fi
done
# where no process says so, a 2 is not its word: a node without the interpreter gives that code, too
if ((code == 2 || code == 78)); then code=1; fi
for fatal in 2 78; do
    if [[ -e $logs/exit-$fatal ]]; then code=$fatal; fi
done
# a process that is told to stop before it can save only ends
if ((asked && code > 128)); then code=75; fi
settle "$code"

if ((code == 0)); then leave 0 "done" "done"; fi
if ((code == 2 || code == 78)); then leave "$code" stop "stopped: exit code $code, which would come again"; fi
go_on "$code" "exit code $code"
