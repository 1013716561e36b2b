PORT ?= 8080
export PORT

.DEFAULT_GOAL := help
.PHONY: help run test bench fuzz lint build demo tunnel

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | expand -t 10

run: build ## start the server on port 8080 (PORT=... for another)
	@exec ./dialstatus

test: ## run the tests
	go test ./...

bench: ## measure both routes against the guide's app
	go test -run '^$$' -bench . -count 3 .

FUZZTIME ?= 10m
fuzz: ## send what strangers may send to each route, for ten minutes (FUZZTIME=...)
	go test -run '^$$' -fuzz FuzzAnswerURL -fuzztime $(FUZZTIME) -fuzzminimizetime 1x .
	go test -run '^$$' -fuzz FuzzActionURL -fuzztime $(FUZZTIME) -fuzzminimizetime 1x .

lint: ## check the format, go vet and staticcheck
	@unformatted=$$(gofmt -s -l .); test -z "$$unformatted" || { echo "run gofmt -s -w $$unformatted"; exit 1; }
	go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

build: ## build the server, ./dialstatus
	@go build -o dialstatus .

demo: build ## play a whole call with curl: each request, its answer and its log record
	@sh -euc "$$DEMO"

tunnel: ## let Plivo reach this machine (needs ngrok)
	ngrok http $(PORT)

define DEMO
log=$$(mktemp)
env -i HOST=127.0.0.1 PORT=0 ./dialstatus >$$log &
server=$$!
trap 'rm $$log; kill $$server; wait $$server' EXIT
trap 'exit 1' INT TERM
until address=$$(grep -o '127[0-9.]*:[0-9]*' $$log); do kill -0 $$server; sleep 0.1; done

leg=38cb006a-e25d-4455-9862-27550dbea7e9
call="CallUUID=$$leg&From=12025550123&To=12025550199&Direction=inbound"
post() { # post PATH FIELDS
	printf '\n%s  %s\n' "$$1" "$$2"
	curl -sSf -d "$$call&$$2" "$$address$$1"
	printf '\n%s\n' "$$(tail -n 1 $$log)"
}
post /dialstatus/ 'CallStatus=ringing'
for dial in 'completed&DialHangupCause=NORMAL_CLEARING' 'busy&DialHangupCause=USER_BUSY' \
	'no-answer&DialHangupCause=NO_ANSWER' 'timeout&DialHangupCause=RECOVERY_ON_TIMER_EXPIRE' \
	'failed&DialHangupCause=UNALLOCATED_NUMBER' 'cancel&DialHangupCause=ORIGINATOR_CANCEL'; do
	post /dialstatus/action/ "DialALegUUID=$$leg&DialStatus=$$dial"
done
post /dialstatus/ 'CallStatus=completed&HangupCause=NORMAL_CLEARING&Duration=14'
endef
export DEMO
