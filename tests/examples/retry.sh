# Generates images over a bad connection: none is lost, and none is generated twice. Needs bash, curl and jq.
#
#     source retry.sh
#     generate http://127.0.0.1:7860 '{"prompt": "a lighthouse", "steps": 20}' > job.json
#     jq -r '.images[0]' job.json | base64 -d > lighthouse.png

# One request by curl, again and again until the webui itself answers it. Prints the answer once all of it is there.
call() {
  local file got status type retry_after wait attempt doubtful=0
  file=$(mktemp) || return
  for ((attempt = 1; ; attempt++)); do
    : > "$file"
    # Below one byte a second for a minute is silence. The white space counts as such, an answer that is long does not.
    got=$(curl -sS --connect-timeout 60 --speed-time 60 --speed-limit 1 -o "$file" \
      -w '%{http_code}|%{content_type}|%header{retry-after}' "$@") || { (($? > 4)) || break; got=broken; }
    IFS='|' read -r status type retry_after <<< "$got"
    case $status:$type in
      204:* | 200:image/*) cat "$file"; rm "$file"; return ;;
      20?:application/json*)
        # -s makes white space alone an empty list. Without it, jq 1.6 says that all is well.
        if jq -es '.[0] | type == "array" or has("id") or has("images")' "$file" &> /dev/null; then
          cat "$file"; rm "$file"; return
        fi ;;
    esac
    # These say that another try may go well, whoever sends them. The rest is a refusal if the request is at fault or
    # the webui says why. Otherwise it may be a gateway, or a webui that is starting: "Not Found".
    case $status in
      broken | 408 | 425 | 429 | 50[1-9] | 5[1-9]? | [6-9]??) ;;
      400 | 401 | 413 | 422) break ;;
      *)
        jq -es '.[0].detail // "Not Found" | . != "Not Found"' "$file" &> /dev/null && break
        ((++doubtful < 30)) || break ;;
    esac
    wait=$((attempt < 30 ? attempt : 30))
    [[ $retry_after =~ ^[1-9][0-9]{0,4}$ ]] || retry_after=0
    retry_after=$((retry_after < 60 ? retry_after : 60))
    wait=$((wait < retry_after ? retry_after : wait))
    echo "Trying again in $wait s: $got" >&2
    sleep "$((wait + RANDOM % (wait + 1) / 2)).$((RANDOM % 10))"
  done
  echo "Refused: $got $(head -c 1000 "$file")" >&2
  rm "$file"
  return 1
}

generate() {
  local url=$1 request=$2 job id
  shift 2 # what is left is for curl, as -u user:password
  # The key makes all attempts one generation; it is accepted at once, and we come back for the images.
  job=$(call "$url/sdapi/v1/txt2img" -H 'Content-Type: application/json' -H 'Prefer: respond-async' \
    -H "Idempotency-Key: $(date +%s)-$$-$RANDOM$RANDOM" -d "$request" "$@") || return
  if ! id=$(jq -er .id <<< "$job"); then
    echo "jobs are not tracked: this webui would generate anew with every attempt" >&2
    return 1
  fi
  while job=$(call "$url/sdapi/v1/job/$id?wait=20&images=false" "$@"); do
    case $(jq -r .status <<< "$job") in
      Completed) call "$url/sdapi/v1/job/$id" "$@"; return ;;
      Failed) jq -r .error <<< "$job" >&2; return 1 ;;
    esac
    sleep 1 # in case something between answers for the webui at once
  done
  return 1
}
