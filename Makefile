PORT ?= 8080
export PORT

.DEFAULT_GOAL := help
.PHONY: help run test bench load fuzz lint build demo tunnel

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | expand -t 10

run: build ## start the server on port 8080 (PORT=... for another)
	@exec ./dialstatus

test: ## run the tests
	go test ./...

bench: ## measure both routes against the guide's app
	go test -run '^$$' -bench . -count 3 .

LOADTIME ?= 5s
load: build ## measure requests a second from outside, on two cores (needs wrk)
	@sh -euc "$$LOAD"

FUZZTIME ?= 10m
fuzz: ## send what strangers may send to each route, for ten minutes (FUZZTIME=...)
	go test -run '^$$' -fuzz FuzzAnswerURL -fuzztime $(FUZZTIME) -fuzzminimizetime 1x .
	go test -run '^$$' -fuzz FuzzActionURL -fuzztime $(FUZZTIME) -fuzzminimizetime 1x .

lint: ## check the format, go vet and staticcheck
	@unformatted=$$(gofmt -s -l .); test -z "$$unformatted" || { echo "run gofmt -s -w $$unformatted"; exit 1; }
	go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

build: ## build the server, ./dialstatus
	@test -x dialstatus || echo 'compiling (the first time this takes half a minute) ...' >&2
	@go build -o dialstatus .

demo: build ## play a call to two numbers with curl: each answer and each log record
	@sh -euc "$$DEMO"

tunnel: ## let Plivo reach this machine (needs ngrok)
	ngrok http $(PORT)

define DEMO
log=$$(mktemp)
env -i HOST=127.0.0.1 PORT=0 DIAL_TO=+12025550123,+12025550143 ./dialstatus >$$log &
server=$$!
trap 'rm $$log; kill -INT $$server; wait $$server' EXIT
trap 'exit 1' INT TERM
until address=$$(grep -o '127[0-9.]*:[0-9]*' $$log); do kill -0 $$server; sleep 0.1; done

a=38cb006a b=c0a58e17 # the A leg and the B leg; Plivo's have 36 characters
post() { # post PATH FIELDS
	curl -sSf -d "CallUUID=$$a&From=12025550123&To=12025550199&Direction=inbound&$$2" "$$address$$1"
}
step() { # step WHAT PATH FIELDS
	answer=$$(post "$$2" "$$3")
	printf '\n# %s\n%s\n%s\n' "$$1" "$$answer" "$$(tail -n 1 $$log)"
}
leg() { # leg WHAT ACTION FIELDS
	step "$$1" /dialstatus/ "CallStatus=in-progress&DialAction=$$2&DialALegUUID=$$a&DialBLegUUID=$$b&DialBLegTo=12025550143&DialBLegStatus=$$2&$$3"
}
dial() { # dial STATUS CAUSE RANG [B-LEG]: the fields
	echo "CallStatus=in-progress&DialALegUUID=$$a&DialBLegUUID=$${4-}&DialStatus=$$1&DialHangupCause=$$2&DialRingStatus=$$3"
}
step 'a call reaches your number: two phones ring' /dialstatus/ 'CallStatus=ringing&Event=StartApp'
leg 'the second one answers' answer 'Event=DialAnswer'
leg 'they talk for 11 seconds, and the called side hangs up' hangup \
	'Event=DialHangup&DialBLegDuration=11&DialBLegHangupCause=NORMAL_CLEARING&DialBLegHangupSource=Callee'
step 'the dial has ended' /dialstatus/action/ "$$(dial completed NORMAL_CLEARING true $$b)"
step 'the call is over' /dialstatus/ 'CallStatus=completed&Event=Hangup&HangupCause=NORMAL_CLEARING&Duration=14'

printf '\n# what else can become of a dial\n'
while read status cause rang; do
	answer=$$(post /dialstatus/action/ "$$(dial $$status $$cause $$rang)")
	printf '%-9s  %s\n' $$status "$$answer"
done <<-END
	busy USER_BUSY true
	no-answer NO_ANSWER true
	timeout RECOVERY_ON_TIMER_EXPIRE false
	failed UNALLOCATED_NUMBER false
	cancel ORIGINATOR_CANCEL true
END
endef
export DEMO

define LOAD
dir=$$(mktemp -d) servers=
trap 'kill $$servers; wait; rm -r $$dir' EXIT
trap 'exit 1' INT TERM
go test -c -o $$dir/guide .
for route in answer action; do TEST_SERVER=wrk ROUTE=$$route $$dir/guide >$$dir/$$route; done
serve() { # serve PORT COMMAND: on the first core
	env -i HOST=127.0.0.1 PORT=$$1 PUBLIC_URL=https://calls.example.org $$2 >/dev/null &
	servers="$$servers $$!"
	taskset -cp 0 $$! >/dev/null
	until curl -so /dev/null 127.0.0.1:$$1; do kill -0 $$!; sleep 0.1; done
}
serve 9001 "TEST_SERVER=guide $$dir/guide"
serve 9002 ./dialstatus
serve 9003 "PLIVO_AUTH_TOKEN=YzBmZmVlYzBmZmVlYzBmZmVl ./dialstatus"
for route in answer action; do
	guide=
	for server in "9001 guide" "9002 dialstatus" "9003 dialstatus-signed"; do
		path=dialstatus/action; test $$route = action || path=dialstatus/
		taskset -c 1 wrk -t1 -c32 -d$(LOADTIME) -s $$dir/$$route http://127.0.0.1:$${server% *}/$$path >$$dir/out
		if grep Non-2xx $$dir/out; then exit 1; fi
		rate=$$(sed -n 's/^Requests.sec: *//p' $$dir/out)
		guide=$${guide:-$$rate}
		echo "$$route $${server#* } $$rate $$guide" |
			awk '{printf "%-7s %-18s %6d requests/s %5.2f x-guide\n", $$1, $$2, $$3, $$3 / $$4}'
	done
done
for server in $$servers; do awk '/VmHWM/ {printf "peak memory %d MiB\n", $$2 / 1024}' /proc/$$server/status; done
endef
export LOAD
