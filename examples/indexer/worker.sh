#!/bin/sh
# worker.sh FOLDER COMMAND...: runs a worker for as long as standard input is open, then stops it and removes FOLDER.
# The demo holds the other end, which the system closes however the demo ends: its worker never outlives it for long.
folder=$1
shift
exec 3<&0
"$@" </dev/null 3<&- &
worker=$!
{ cat >/dev/null; kill -TERM "$worker"; } <&3 2>/dev/null &
exec 3<&-
wait "$worker"
status=$?
rm -rf -- "$folder"
exit "$status"
