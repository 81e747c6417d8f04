# Generates each job once more that failed or was cancelled in the last day, as a new job, and prints which that is.
# Needs bash, curl and jq.
API=http://127.0.0.1:7860/sdapi/v1
AFTER=$(($(date +%s) - 86400))
for ID in $(curl -sSf "$API/jobs?status=failed&after=$AFTER&limit=1000" | jq -r 'reverse | .[].id'); do
  curl -sSf -X POST "$API/job/$ID/retry" | jq -r '"\(.id) repeats \(.retry_of)"'
done
