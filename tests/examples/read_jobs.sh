# Reads jobs.json while a webui writes to it: by a copy that is made under the lock. Run it in the folder of jobs.json.
# Needs flock and jq.
flock jobs.json.lock cp jobs.json ~/jobs-copy.json
# The jobs that failed, and why.
jq -r '.[] | select(.status == "Failed") | "\(.id)  \(.error)"' ~/jobs-copy.json
# How many jobs each client sent.
jq -r '[.[] | select(.)] | group_by(.ip)[] | "\(length)  \(.[0].ip)"' ~/jobs-copy.json
# The image files of all jobs with a word in the prompt.
jq -r '.[] | select(.) | select(.prompt | test("lighthouse"; "i")) | .images[]?' ~/jobs-copy.json
