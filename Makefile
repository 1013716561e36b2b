PORT ?= 8080
export PORT

.DEFAULT_GOAL := help
.PHONY: help run test bench fuzz lint build demo tunnel

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile | expand -t 10

# Each line of .env must be NAME='value'. What was set before make wins.
run: build ## start the server, with the settings in .env if there is one
	@bad=$$(grep -nvE "^([A-Z_]+='[^']*'|#.*)?$$" .env 2>/dev/null | cut -d: -f1); \
	test -z "$$bad" || { echo .env: write NAME="'value'" in line $$bad >&2; exit 1; }; \
	before=$$(export -p); set -a; test ! -e .env || . ./.env; eval "$$before"; \
	HOST=$${HOST:-localhost} exec ./dialstatus

test: ## run the tests
	go test ./...

bench: ## measure both routes against the guide's app
	go test -run '^$$' -bench . -count 3 .

FUZZTIME ?= 10m
fuzz: ## send what strangers may send, for ten minutes (FUZZTIME=...)
	go test -run '^$$' -fuzz . -fuzztime $(FUZZTIME) -fuzzminimizetime 1x .

lint: ## check the format, go vet and staticcheck
	@unformatted=$$(gofmt -s -l .); test -z "$$unformatted" || { echo "run gofmt -s -w $$unformatted"; exit 1; }
	go vet ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

build: ## build the server, ./dialstatus: static, for any Linux
	@test -x dialstatus || echo 'compiling (the first time this takes half a minute) ...' >&2
	@CGO_ENABLED=0 go build -buildvcs=false -o dialstatus .

DEMO_PORT ?= 8089
demo: build ## play a call to two phones with curl: each answer and each record
	@env -i HOST=127.0.0.1 PORT=$(DEMO_PORT) DIAL_TO=+12025550123,+12025550143 ./dialstatus & \
	trap "kill $$! 2>/dev/null; wait" EXIT; sleep 1; kill -0 $$! 2>/dev/null && echo "$$DEMO" | sh -ev

tunnel: ## let Plivo reach this machine (needs ngrok)
	ngrok http $(PORT)

# Plivo's part of a call, as it posts it (its UUIDs are longer).
define DEMO
# a call reaches your number, and two phones ring
curl -sS -d 'Event=StartApp&CallStatus=ringing&CallUUID=38cb006a' \
	-d 'Direction=inbound&From=12025550123&To=12025550199' localhost:$(DEMO_PORT)/dialstatus/; echo

# the second one answers
curl -sS -d 'Event=DialAnswer&DialAction=answer&DialBLegTo=12025550143&DialBLegStatus=answer' \
	-d 'DialALegUUID=38cb006a&DialBLegUUID=c0a58e17&CallUUID=38cb006a' localhost:$(DEMO_PORT)/dialstatus/; echo

# they talk for 11 seconds, and the called side hangs up
curl -sS -d 'Event=DialHangup&DialAction=hangup&DialBLegTo=12025550143&DialBLegStatus=hangup' \
	-d 'DialBLegDuration=11&DialBLegHangupCause=NORMAL_CLEARING&DialBLegHangupCauseName=Normal+Hangup' \
	-d 'DialBLegHangupSource=Callee' \
	-d 'DialALegUUID=38cb006a&DialBLegUUID=c0a58e17&CallUUID=38cb006a' localhost:$(DEMO_PORT)/dialstatus/; echo

# the dial has ended
curl -sS -d 'DialStatus=completed&DialHangupCause=NORMAL_CLEARING&DialRingStatus=true' \
	-d 'DialALegUUID=38cb006a&DialBLegUUID=c0a58e17&CallUUID=38cb006a' \
	-d 'From=12025550123&To=12025550199' localhost:$(DEMO_PORT)/dialstatus/action/; echo

# the call is over
curl -sS -d 'Event=Hangup&CallStatus=completed&CallUUID=38cb006a&Duration=14' \
	-d 'HangupCause=NORMAL_CLEARING&HangupCauseName=Normal+Hangup&HangupSource=Callee' \
	-d 'Direction=inbound&From=12025550123&To=12025550199' localhost:$(DEMO_PORT)/dialstatus/; echo

# another dial: nobody answers
curl -sS -d 'DialStatus=no-answer&DialHangupCause=NO_ANSWER&DialRingStatus=true' localhost:$(DEMO_PORT)/dialstatus/action/; echo
endef
export DEMO
