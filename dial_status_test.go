package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/go-martini/martini"
	plivoxml "github.com/plivo/plivo-go/v7/xml"
)

// Forms that Plivo posts while a call goes on. The first and the last form are
// modelled on captured requests, the others on Plivo's documentation.
const (
	newCall = "BillRate=0.005&CallStatus=ringing&CallUUID=" + aLeg + "&CountryCode=US" +
		"&Direction=inbound&Event=StartApp&From=12025550123&ParentAuthID=MAXXXXXXXXXXXXXXXXXX" +
		"&STIRVerification=Not+Applicable&SessionStart=2024-10-25+14%3A13%3A37.779297&To=12025550199"
	endedLeg = "BillRate=0.005&CallStatus=in-progress&CallUUID=" + aLeg + "&DialALegUUID=" + aLeg +
		"&DialAction=hangup&DialBLegBillDuration=60&DialBLegBillRate=0.01&DialBLegDuration=11" +
		"&DialBLegFrom=12025550123&DialBLegHangupCause=NORMAL_CLEARING&DialBLegHangupCauseCode=4000" +
		"&DialBLegHangupCauseName=Normal+Hangup&DialBLegHangupSource=Callee&DialBLegPosition=2" +
		"&DialBLegStatus=hangup&DialBLegTo=12025550143&DialBLegUUID=" + bLeg +
		"&Direction=inbound&Event=DialHangup&From=12025550123&To=12025550199"
	endedDial = "BillRate=0.005&CallStatus=in-progress&CallUUID=" + aLeg + "&DialALegUUID=" + aLeg +
		"&DialBLegUUID=" + bLeg + "&DialHangupCause=NORMAL_CLEARING&DialRingStatus=true" +
		"&DialStatus=completed&Direction=inbound&Event=Redirect&From=12025550123&To=12025550199"
	endedCall = "BillDuration=60&BillRate=0.005&CallStatus=completed&CallUUID=" + aLeg +
		"&Direction=inbound&Duration=14&EndTime=2024-10-25+14%3A13%3A55&Event=Hangup" +
		"&From=12025550123&HangupCause=NORMAL_CLEARING&HangupCauseCode=4000" +
		"&HangupCauseName=Normal+Hangup&HangupSource=Caller&To=12025550199"
	aLeg = "38cb006a-e25d-4455-9862-27550dbea7e9"
	bLeg = "c0a58e17-9d24-4f6b-8a13-72e5b4c9d806"
)

// The documents that the server answers with. Between the two parts of the tag
// <Dial ...>, plivo-go writes the time-out and the caller ID.
const (
	emptyDocument  = `<Response></Response>`
	hangupDocument = `<Response><Hangup></Hangup></Response>`
	dialDocument   = dialTag1 + dialTag2 + `<Number>+12025550123</Number></Dial></Response>`

	dialTag1 = `<Response><Dial action="http://example.com/dialstatus/action/" method="POST"`
	dialTag2 = ` callbackUrl="http://example.com/dialstatus/" callbackMethod="POST" redirect="true">`
)

// What several tests send or expect.
const (
	action        = "/dialstatus/action/"
	callStart     = `"level":"INFO","msg":"call"` // without {"time":"...", see records
	probeOK       = "200 dialstatus is running: the answer URL is /dialstatus/\n"
	notForm       = "the body is not a form: send it as application/x-www-form-urlencoded"
	notURLEncoded = "the form or the query is not URL-encoded: write % as %25, and ; as %3B"
	noDialStatus  = "DialStatus is missing: send the form that Plivo posts"
	notAuthorized = "the request has no valid signature or login. Check that PUBLIC_URL is the URL " +
		"that Plivo calls, and that PLIVO_AUTH_TOKEN is the auth token of the account that owns " +
		"the phone number"
)

func TestAnswerURL(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ name, form, document, record string }{
		{name: "a new call", form: newCall, document: dialDocument, record: "call"},
		{name: "outbound call", form: "CallStatus=in-progress", document: dialDocument, record: "call"},
		{name: "no DialAction", form: "Event=DialHangup", document: dialDocument, record: "call"},
		{name: "lower case", form: "Event=hangup", document: dialDocument, record: "call"},
		{name: "capitals", form: "CallStatus=Completed", document: dialDocument, record: "call"},
		{name: "a B leg ends", form: endedLeg, document: emptyDocument, record: "leg"},
		{name: "both events", form: "DialAction=x&Event=Hangup", document: emptyDocument, record: "leg"},
		{name: "empty leg", form: "DialAction=&Event=Hangup", document: emptyDocument, record: "hangup"},
	} {
		t.Run(test.name, func(t *testing.T) {
			record := `"level":"INFO","msg":"` + test.record + `"`
			app.checkXML(t, post("/dialstatus/", test.form), test.document, record)
			app.checkXML(t, post("/dialstatus?"+test.form, ""), test.document, record)
		})
	}
	for _, status := range []string{"completed", "busy", "failed", "timeout", "no-answer", "cancel"} {
		t.Run("the call ends: "+status, func(t *testing.T) {
			app.checkXML(t, post("/dialstatus/", "Event=X&CallStatus="+status), emptyDocument,
				`"level":"INFO","msg":"hangup"`)
		})
	}
}

func TestActionURL(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ status, level, sentence string }{
		{status: "completed", level: "INFO"},
		{status: "cancel", level: "INFO"},
		{status: "busy", level: "INFO", sentence: "The line is busy. Please try again later."},
		{status: "no-answer", level: "INFO", sentence: "Nobody answered. Please try again later."},
		{status: "timeout", level: "INFO",
			sentence: "The call could not be connected in time. Please try again later."},
		{status: "failed", level: "INFO", sentence: "The call could not be connected."},
		{status: "Completed", level: "WARN", sentence: "The call has ended."},
	} {
		t.Run(test.status, func(t *testing.T) {
			document := hangupDocument
			if test.sentence != "" {
				document = "<Response><Speak>" + test.sentence + "</Speak><Hangup></Hangup></Response>"
			}
			form := strings.Replace(endedDial, "completed", test.status, 1)
			app.checkXML(t, post("/dialstatus/action", form), document,
				`"level":"`+test.level+`","msg":"dial","DialStatus":"`+test.status+`"`)
		})
	}
	app.checkRejection(t, post(action, newCall), 400, noDialStatus)
}

// Each of these requests says that a dial was completed.
func TestFields(t *testing.T) {
	app := newTestApp(t)
	const contentType = "Content-Type: application/x-www-form-urlencoded"
	for name, r := range map[string]*http.Request{
		"type in capitals":  post(action, endedDial, strings.Replace(contentType, "form", "FORM", 1)),
		"charset":           post(action, endedDial, contentType+";charset=utf-8"),
		"charset and space": post(action, endedDial, contentType+" ; charset=utf-8"),
		"a query":           post(action+"?"+endedDial, "", "Content-Type: application/json"),
		"body and query":    post(action+"?DialStatus=busy", endedDial),
		"two values":        post(action, endedDial+"&DialStatus=busy"),
		"unknown length":    post(action, endedDial, "Content-Length: unknown"),
		"longest body":      post(action, endedDial+"&x="+strings.Repeat("a", 16<<10-len(endedDial)-3)),
	} {
		t.Run(name, func(t *testing.T) {
			app.checkXML(t, r, hangupDocument, `"level":"INFO","msg":"dial","DialStatus":"completed"`)
		})
	}
}

func TestDialDocument(t *testing.T) {
	for _, test := range []struct {
		name               string
		variables          []string
		attributes, phones string // of the <Dial>
	}{
		{name: "without +", variables: []string{"DIAL_TO=9902555"}, phones: "<Number>9902555</Number>"},
		{name: "longest number", variables: []string{"DIAL_TO=+120255501234567"},
			phones: "<Number>+120255501234567</Number>"},
		{name: "several phones", variables: []string{"DIAL_TO=+12025550101,\t sip:1@h0 ,12025550102\n"},
			phones: "<Number>+12025550101</Number><User>sip:1@h0</User><Number>12025550102</Number>"},
		{name: "all characters of a SIP URI",
			variables: []string{"DIAL_TO=sip:!a'#$%&*()/+-.:;=?AZ[\\]^_`{|}~@[::1];a=1&b"},
			phones:    "<User>sip:!a&#39;#$%&amp;*()/+-.:;=?AZ[\\]^_`{|}~@[::1];a=1&amp;b</User>"},
		{name: "attributes", variables: []string{"CALLER_ID=12025550150", "DIAL_TIMEOUT=1"},
			attributes: ` timeout="1" callerId="12025550150"`, phones: "<Number>+12025550123</Number>"},
	} {
		t.Run(test.name, func(t *testing.T) {
			newTestApp(t, test.variables...).checkXML(t, post("/dialstatus/", newCall),
				dialTag1+test.attributes+dialTag2+test.phones+"</Dial></Response>", callStart)
		})
	}
	newTestApp(t, "CALLBACK_CONFIG=rc=3").checkXML(t, post("/dialstatus/", newCall),
		strings.ReplaceAll(dialDocument, `/" `, `/#rc=3" `), callStart) // at the end of both URLs
	everything := newTestApp(t, "PUBLIC_URL=http://calls.example.org", "CALLER_ID=+12025550150",
		"DIAL_TIMEOUT=30", "CALLBACK_CONFIG=#rc=3&rp=5xx,ct", "DIAL_TO=+12025550101")
	everything.checkXML(t, post("/dialstatus/", newCall),
		`<Response><Dial action="http://calls.example.org/dialstatus/action/#rc=3&amp;rp=5xx,ct" `+
			`method="POST" timeout="30" callerId="+12025550150" `+
			`callbackUrl="http://calls.example.org/dialstatus/#rc=3&amp;rp=5xx,ct" `+
			`callbackMethod="POST" redirect="true"><Number>+12025550101</Number></Dial></Response>`,
		callStart)
}

// The URLs in the <Dial>, and the URL in the record of a rejection, begin with
// the URL by which Plivo reached the server.
func TestBaseURL(t *testing.T) {
	const forwardedHTTPS = "X-Forwarded-Proto: https"
	const oddHost = `a_b.<"x">&'/?#@%.`
	withoutPublicURL := newTestApp(t) // one for all: an app must not remember a host
	for _, test := range []struct{ name, publicURL, headers, baseURL string }{
		{name: "curl", headers: "Host: localhost:8080", baseURL: "http://localhost:8080"},
		{name: "IPv6", headers: "Host: [::1]:80", baseURL: "http://[::1]"},
		{name: "two proxies", headers: "X-Forwarded-Proto: HTTPS , http; " +
			"X-Forwarded-Host: Calls.Example.org:8443,inner:80",
			baseURL: "https://Calls.Example.org:8443"},
		{name: "two lines", headers: "X-Forwarded-Host: a; X-Forwarded-Host: b", baseURL: "http://a"},
		{name: "http", headers: "X-Forwarded-Proto: http,https", baseURL: "http://example.com"},
		{name: "port 80", headers: "X-Forwarded-Host: a:80; " + forwardedHTTPS, baseURL: "https://a:80"},
		{name: "only a scheme", headers: forwardedHTTPS, baseURL: "https://example.com"},
		{name: "ftp", headers: "Host: a:443; X-Forwarded-Proto: ftp", baseURL: "http://a:443"},
		{name: "port 443", headers: "X-Forwarded-Host: a:443; " + forwardedHTTPS, baseURL: "https://a"},
		{name: "port 4430", headers: "Host: a:4430; " + forwardedHTTPS, baseURL: "https://a:4430"},
		{name: "no host", headers: "Host: ", baseURL: ""},
		{name: "odd host", headers: "X-Forwarded-Host: " + oddHost, baseURL: "http://" + oddHost},
		{name: "PUBLIC_URL", publicURL: "https://calls.example.org:8443/plivo/",
			headers: "Host: evil.example; X-Forwarded-Host: evil.example; " + forwardedHTTPS,
			baseURL: "https://calls.example.org:8443/plivo"},
	} {
		t.Run(test.name, func(t *testing.T) {
			app := withoutPublicURL
			if test.publicURL != "" {
				app = newTestApp(t, "PUBLIC_URL="+test.publicURL)
			}
			headers := strings.Split(test.headers, "; ")
			var escaped strings.Builder
			xml.EscapeText(&escaped, []byte(test.baseURL))
			app.checkXML(t, post("/dialstatus/", newCall, headers...),
				strings.ReplaceAll(dialDocument, "http://example.com", escaped.String()), callStart)
			rejected := post(action+"?a=b", "", headers...)
			app.send(rejected)
			check(t, "record", app.logOfRequest(), rejectionLine(rejected, test.baseURL, 400, noDialStatus))
		})
	}
}

func TestNotFound(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ method, path, allow string }{
		{method: "GET", path: "/dialstatus/", allow: "POST"},
		{method: "PUT", path: "/dialstatus/action", allow: "POST"},
		{method: "POST", path: "/", allow: "GET"},
		{method: "GET", path: "/dial_status.go"}, // files are not served
	} {
		t.Run(test.method+" "+test.path, func(t *testing.T) {
			r := httptest.NewRequest(test.method, test.path, nil)
			r.Header["X-Forwarded-For"] = []string{"192.0.2.1, 192.0.2.2", "192.0.2.3"}
			status := http.StatusNotFound
			if test.allow != "" {
				status = http.StatusMethodNotAllowed
			}
			app.checkRejection(t, r, status, "this path does not serve "+test.method+
				". Send POST to /dialstatus/ or /dialstatus/action/ instead, such as: "+
				"curl -d CallStatus=ringing http://example.com/dialstatus/")
			check(t, "Allow", app.answer.Result().Header.Get("Allow"), test.allow)
		})
	}
}

func TestBadInput(t *testing.T) {
	app := newTestApp(t)
	const answerURL = "/dialstatus/?a=b" // a good query, beside a bad body
	for name, r := range map[string]*http.Request{
		"JSON":        post(answerURL, "1", "Content-Type: a/json", "Content-Length: unknown"),
		"empty type":  post(answerURL, "a=b", "Content-Type: "),
		"longer type": post(answerURL, "a=b", "Content-Type: application/x-www-form-urlencoded2"),
	} {
		t.Run(name, func(t *testing.T) { app.checkRejection(t, r, 415, notForm) })
	}
	for name, r := range map[string]*http.Request{
		"; in the form":  post(answerURL, "a=b;c"),
		"% in the query": post("/dialstatus/?a=%zz", ""),
	} {
		t.Run(name, func(t *testing.T) { app.checkRejection(t, r, 400, notURLEncoded) })
	}
	t.Run("a body that is cut off", func(t *testing.T) {
		r := post(answerURL, newCall)
		r.Body = io.NopCloser(io.MultiReader(r.Body, iotest.ErrReader(io.ErrUnexpectedEOF)))
		app.checkRejection(t, r, 400, "the body was cut off or came too slowly: send the whole body")
	})
	t.Run("a long body is not read to the end", func(t *testing.T) {
		r, body := post(answerURL, ""), strings.NewReader(strings.Repeat("a", 1<<20))
		r.Body = io.NopCloser(body)
		app.checkRejection(t, r, 413, "send a body of at most 16384 bytes")
		check(t, "bytes read", 1<<20-body.Len(), 16<<10+1)
	})
}

// recordFields lists the fields of each record, in the order of the log.
var recordFields = map[string][]string{
	"call": {"CallUUID", "From", "To", "Direction", "CallStatus"},
	"leg": {"DialAction", "DialALegUUID", "DialBLegUUID", "DialBLegTo", "DialBLegStatus",
		"DialBLegDuration", "DialBLegHangupCause", "DialBLegHangupCauseName",
		"DialBLegHangupSource", "CallUUID"},
	"dial": {"DialStatus", "DialALegUUID", "DialBLegUUID", "DialRingStatus", "DialHangupCause",
		"CallUUID", "From", "To"},
	"hangup": {"CallUUID", "From", "To", "Direction", "CallStatus", "HangupCause",
		"HangupCauseName", "HangupSource", "Duration"},
}

// A value is cut after 256 bytes, which JSON may write as six bytes each. So
// the longest record is shorter than 16 KiB, where Docker splits a line.
func TestRecords(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ name, record, target, form string }{
		{name: "call", record: "call", target: "/dialstatus/", form: newCall},
		{name: "leg", record: "leg", target: "/dialstatus/", form: endedLeg},
		{name: "dial", record: "dial", target: action, form: endedDial},
		{name: "missing fields", record: "dial", target: action, form: "DialStatus=busy"},
		// The long form, below, has only recordFields: Event is in the query.
		{name: "hangup", record: "hangup", target: "/dialstatus/?Event=Hangup", form: endedCall},
	} {
		t.Run(test.name, func(t *testing.T) {
			sent, long := must(url.ParseQuery(test.form)), make(url.Values)
			var attributes []any
			for _, field := range recordFields[test.record] {
				attributes = append(attributes, field, sent.Get(field))
				long.Set(field, strings.Repeat("\x01", 256)+"\x02")
			}
			app.send(post(test.target, test.form))
			check(t, "record", app.logOfRequest(), logLine(slog.LevelInfo, test.record, attributes...))
			app.send(post(test.target, long.Encode()))
			kept := strings.Count(app.logOfRequest(), `\u0001`)
			check(t, "the first 256 bytes", kept, 256*len(recordFields[test.record]))
			check(t, "bytes after the first 256", strings.Count(app.logOfRequest(), `\u0002`), 0)
			check(t, "a record below 16 KiB", app.logged.Len() < 16<<10, true)
		})
	}
}

func TestLongRejections(t *testing.T) {
	app := newTestApp(t)
	for name, r := range map[string]*http.Request{
		"path":             post("/"+strings.Repeat("%01", 4000), ""),
		"query":            post("/?"+strings.Repeat("%01", 4000), ""),
		"method":           httptest.NewRequest(strings.Repeat("a", 12000), "/", nil),
		"X-Forwarded-For":  post("/", "", "X-Forwarded-For: "+strings.Repeat("\x01", 12000)),
		"X-Forwarded-Host": post("/", "", "X-Forwarded-Host: "+strings.Repeat("\x01", 12000)),
	} {
		answer := app.send(r)
		check(t, "records", strings.Count(app.logged.String(), `"msg":"rejected"`), 1)
		check(t, "a short record in spite of a long "+name, app.logged.Len() < 8<<10, true)
		check(t, "a short answer in spite of a long "+name, answer.Body.Len() <= 257, true)
	}
}

// A flood of requests that are rejected leaves 20 records in a second. Every
// request is still answered, and every report is still logged.
func TestFlood(t *testing.T) {
	t.Parallel()
	app := newTestApp(t)
	for range 2 {
		time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second))) // a new second
		app.logged.Reset()
		var senders sync.WaitGroup
		for range 100 {
			senders.Add(1)
			go func() {
				defer senders.Done()
				answer := httptest.NewRecorder()
				app.ServeHTTP(answer, post(action, ""))
				check(t, "answer", fmt.Sprint(answer.Code, " ", answer.Body), "400 "+noDialStatus+"\n")
				app.ServeHTTP(httptest.NewRecorder(), post(action, endedDial))
			}()
		}
		senders.Wait()
		check(t, "rejections", strings.Count(app.logged.String(), `"msg":"rejected"`), 20)
		check(t, "reports", strings.Count(app.logged.String(), `"msg":"dial"`), 100)
	}
	app.lastRejection += 3600 // after now, as if the clock had been set back
	app.logged.Reset()
	app.ServeHTTP(httptest.NewRecorder(), post("/", ""))
	check(t, "rejections after the clock was set back",
		strings.Count(app.logged.String(), `"msg":"rejected"`), 1)
}

// The data of TestValidateSignatureV3Pass1 and Pass3 in plivo-go's tests.
func TestPublishedSignatures(t *testing.T) {
	const (
		authToken = "Y2Q2ZDgxZmY5YWRiOTI5YmQ1Njg0MTAxZWIyOTc4"
		nonce     = "31627761595286130198"
		calledURL = "https://plivobin.non-prod.plivops.com/api/v1/validate_signature03.xml"
		uuid      = "3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"
		user      = "sip:PlivoSignature382029104058171078704104@"
	)
	form := must(url.ParseQuery("ALegRequestUUID=" + uuid + "&ALegUUID=" + uuid + "&BillRate=0.002" +
		"&CallStatus=in-progress&CallUUID=" + uuid + "&Direction=outbound&Event=StartApp" +
		"&From=19792014278&ParentAuthID=MANWVLYTK4ZWU1YTY4QA&RequestUUID=" + uuid +
		"&SIP-H-To=%3C" + user + "52.9.11.55%3Btransport=udp%3E%3Btag=1" +
		"&SessionStart=2020-04-08+11:34:33.238707&To=" + user + "phone-qa.voice.plivodev.com"))
	check(t, "signature of a form", sign(authToken, signedText(calledURL, nil, form, nonce)),
		"iAjE5QqI37mbkYe4w3jTMudqEzbDufdqi7sYwTu64e0=")
	query := url.Values{"a": {"b"}, "c": {"d"}}
	check(t, "signature of a query and a form",
		sign(authToken, signedText(calledURL+"/", query, form, nonce)),
		"k7Pusd4OxCIjR5IfA9iedDNu/h/gbdYqdzG/MiYtd1c=")
}

// The configuration of the apps that check signatures, and the headers.
const (
	testToken      = "YzBmZmVlYzBmZmVlYzBmZmVl"
	testLogin      = "phlo: pass:word'\"x"
	testNonce      = "05429567804466091622"
	publicURL      = "https://Calls.example.org"
	v3Name         = "X-Plivo-Signature-V3: "
	v3MainName     = "X-Plivo-Signature-Ma-V3: " // the main account signs, for a subaccount
	nonceName      = "X-Plivo-Signature-V3-Nonce: "
	nonceHeader    = nonceName + testNonce
	otherSignature = "c2lnbmVk" // not a signature, but base64
	urlWithQuery   = action + "?a=b"
)

// postWith returns a post of endedDial with headers.
func postWith(headers ...string) *http.Request { return post(action, endedDial, headers...) }

// signatureOf returns the signature of a post of this form to the action URL.
func signatureOf(form, nonce string) string {
	return plivoSignature(testToken, publicURL+action, form, nonce)
}

func TestAcceptedSenders(t *testing.T) {
	const token = "PLIVO_AUTH_TOKEN=" + testToken
	app := newTestApp(t, token, "PHLO_BASIC_AUTH="+testLogin, "PUBLIC_URL="+publicURL+"///")
	signature := signatureOf(endedDial, testNonce)
	for name, r := range map[string]*http.Request{
		"repeated field":     signedPost(action, endedDial+strings.Repeat("&To=2&To=1&To=", 200)),
		"similar names":      signedPost(urlWithQuery+"&a-b=1&a1=2", endedDial+"&To-b=1&To1=2"),
		"dot after the form": signedPost(urlWithQuery, endedDial+"."),
		"empty query name":   signedPost("/dialstatus/?=", ""),
		"not ASCII":          signedPost(urlWithQuery+"&N=%C3%BC", endedDial+"&N=%E7%8E%8B%ff\n"),
		"no query, no form":  signedPost("/dialstatus/?", ""),
		"escape in the path": signedPost("/dialstatus%2Faction/", endedDial),
		"subaccount":         postWith(nonceHeader, v3MainName+otherSignature, v3MainName+signature),
		"the last of four signatures": postWith(nonceHeader,
			v3Name+strings.Repeat(otherSignature+", ", 3)+signature+" ,"),
		"the second header":  postWith(nonceHeader, v3Name+otherSignature, v3Name+signature),
		"nonce with letters": postWith(nonceName+"aZ", v3Name+signatureOf(endedDial, "aZ")),
		"signed, bad login":  signedPost(action, endedDial, login(":")),
		"PHLO's login":       postWith(login(testLogin)),
	} {
		t.Run(name, func(t *testing.T) { check(t, "status", app.send(r).Code, 200) })
	}
	ngrok := signedPost("/dialstatus/", newCall, "X-Forwarded-Proto: https", "Host: localhost:8080",
		"X-Forwarded-Host: Calls.example.org")
	check(t, "status behind ngrok", newTestApp(t, token).send(ngrok).Code, 200)
	anybody := postWith(nonceHeader, v3Name+otherSignature)
	withoutToken := newTestApp(t, "PHLO_BASIC_AUTH="+testLogin)
	check(t, "status without a token", withoutToken.send(anybody).Code, 200)
}

func TestForgeries(t *testing.T) {
	app := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin,
		"PUBLIC_URL="+publicURL)
	signature := signatureOf(endedDial, testNonce)
	// forge returns a post with the headers of a request that Plivo signed.
	forge := func(signed *http.Request, target, form string) *http.Request {
		forgery := post(target, form)
		forgery.Header = signed.Header
		return forgery
	}
	signed, signedQuery := signedPost(action, endedDial), signedPost(urlWithQuery, endedDial)
	for name, r := range map[string]*http.Request{
		"no signature":           post("/dialstatus/", newCall),
		"a changed field":        forge(signed, action, strings.Replace(endedDial, "true", "false", 1)),
		"one more query":         forge(signed, urlWithQuery, endedDial),
		"one more query value":   forge(signedQuery, urlWithQuery+"&a=c", endedDial),
		"dots added to the form": forge(signedQuery, urlWithQuery, endedDial+".."),
		"dot added to the query": forge(signedPost(urlWithQuery, ""), urlWithQuery+"%2E", ""),
		"another path":           forge(signed, "/dialstatus/", endedDial),
		"escape in the path":     forge(signed, "/dialstatus%2Faction/", endedDial),
		// Plivo signed the form endedDial+".end" and the nonce 0542.
		"the end of the form in the nonce": postWith(nonceName+"end.0542",
			v3Name+signatureOf(endedDial+".end", "0542")),
		"an empty nonce":              postWith(nonceName+"", v3Name+signatureOf(endedDial, "")),
		"a part of the signature":     postWith(nonceHeader, v3Name+signature[:43]),
		"more than the signature":     postWith(nonceHeader, v3Name+signature+"="),
		"the signature in lower case": postWith(nonceHeader, v3Name+strings.ToLower(signature)),
		"signature V2, without the form": postWith(nonceHeader, "X-Plivo-Signature-V2-Nonce: "+testNonce,
			"X-Plivo-Signature-V2: "+hmacBase64(testToken, publicURL+action+testNonce)),
		"another password":   postWith(login(strings.Replace(testLogin, "pass", "PASS", 1))),
		"a shorter password": postWith(login(testLogin[:len(testLogin)-1])),
		"a longer password":  postWith(login(testLogin + " ")),
		"another user":       postWith(login("x" + testLogin)),
	} {
		t.Run(name, func(t *testing.T) { app.checkRejection(t, r, 403, notAuthorized) })
	}
	withoutLoginAndURL := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken)
	for name, r := range map[string]*http.Request{
		"signed for https, not http": signedPost(action, endedDial, "Host: Calls.example.org"),
		"only a nonce":               postWith(nonceHeader),
	} {
		t.Run(name, func(t *testing.T) { withoutLoginAndURL.checkRejection(t, r, 403, notAuthorized) })
	}
}

func TestConfiguration(t *testing.T) {
	for _, variable := range []string{
		"DIAL_TIMEOUT=999999999", "MARTINI_ENV=test", "MARTINI_ENV=development",
		"PLIVO_AUTH_TOKEN=aZ0+/_-=", "PHLO_BASIC_AUTH=ü:x:", `PHLO_BASIC_AUTH=x "y:"b"c`,
		"PUBLIC_URL=http://dialstatus/mydialstatus/dialstatus1", "PUBLIC_URL=http://a-Z9.b_/",
		"PUBLIC_URL=http://[fe80::FFFF:1.2.3.4]:65535/AZaz09%20~.-_",
		"CALLBACK_CONFIG=ct=2000&er=n_california&plivo_retries=5", "CALLBACK_CONFIG=az=AZaz09_,",
	} {
		_, err := configure(environment(variable))
		check(t, "error with "+variable, fmt.Sprint(err), "<nil>")
	}
	for variable, address := range map[string]string{"PORT=0": ":0",
		"HOST=[FE80::1%eth0]": "[FE80::1%eth0]:8080", "HOST=fe80::1%eth-0": "[fe80::1%eth-0]:8080"} {
		cfg := newTestApp(t, variable).config
		check(t, "address with "+variable, cfg.address, address)
	}
}

func TestConfigurationErrors(t *testing.T) {
	for variable, values := range map[string][]string{
		"DIAL_TO": {"me", "+120255", "+02025550123", "++12025550123", "+1202555012345678",
			"+1 202 555 0123", "+1-202-555-0123", "tel:+12025550123", "12025550123,", ",12025550123",
			"12025550123;12025550124", " ", `"+12025550101"`, "sip:user:s3cret@host x", "sip:a", "sip:@b",
			"sip:a@", "sip:a@b@c", "sip:a@bü", "sip:a@b\x7f", "sip:a@b\x01", "sip:a\n@b", "sip:a@b<",
			"sip:a>@b", `sip:"a"@b`, "sip:a b@c", "sip:a,b@c", "sips:a@b", "SIP:a@b"},
		"CALLER_ID":    {"Alice", "sip:a@b", "12025550123,12025550124", "12025550123\n"},
		"DIAL_TIMEOUT": {"0", "-1", "1.5", "30s", "1234567890"},
		"PUBLIC_URL": {"h", "ftp://h", "HTTPS://h", "https://", "https://h:", "https://[fe80::1%25e]",
			"https://a*b", "http://h/%zz", "https://h/a b", "https://h/?", "https://h/#", `http://h/a"b`,
			"http://h/a<b", "http://h/a+b", "http://.h", "http://_h", "http://-h", "https://h~",
			"https://h%C3%BC", "https://h/dialstatus", "https://h/a/dialstatus/",
			"https://h/dialstatus%2Faction/x",
			"https://s3cret@example.com"},
		"CALLBACK_CONFIG": {"#", "rc", "rc=", "=3", "rc=3&", "&rc=3", "##rc=3", "rc=3&&rp=5xx",
			"rc=3#rp=5xx", "rc=3;rp=5xx", "RC=3", "rc=-1", `"rc=3"`, "rc=3rp=5xx", "r1=3", "rc=3.5"},
		"HOST":             {"a b", "a\n", "[", "]", "[]", "[::1", "::1]", "[a b]", "[[::1]", "[::1]]"},
		"PORT":             {"-1", " 80", "80\n"},
		"MARTINI_ENV":      {"Production", "production ", "protest", `"test"`},
		"PLIVO_AUTH_TOKEN": {"s3cret\n", "\ts3cret", "s3 cret", `"s3cret"`, "'s3cret'"},
		"PHLO_BASIC_AUTH": {"s3;cret", ":s3cret", "s3cret:", "a:b\n", "a\nb:c", "a:\tb", " a:b", "a:b ",
			`"a:b`, "'a:b", `a:b"`, "a:b'"},
	} {
		for _, value := range values {
			shown := value
			if strings.Contains(variable, "AUTH") || strings.Contains(value, "@") {
				shown = "(not shown)"
			}
			_, err := configure(environment(variable + "=" + value))
			start, _, _ := strings.Cut(fmt.Sprint(err), ": it must be ")
			check(t, "error", start, fmt.Sprintf("%s %q", variable, shown))
		}
	}
	_, err := configure(environment("MARTINI_ENV=production", "DIAL_TIMEOUT=x"))
	check(t, "errors in production", fmt.Sprint(err),
		"DIAL_TO is not set: MARTINI_ENV=production needs it\n"+
			`DIAL_TIMEOUT "x": it must be the time for which phones ring, in whole seconds, at least 1`+
			"\nPUBLIC_URL is not set: MARTINI_ENV=production needs it"+
			"\nPLIVO_AUTH_TOKEN is not set: MARTINI_ENV=production needs it")
}

func TestServerLimits(t *testing.T) {
	server := httptest.NewUnstartedServer(nil)
	server.Config = newServer(newTestApp(t).app)
	server.Start()
	defer server.Close()
	address := server.Listener.Addr().String()
	status := func(form, header string) string {
		return exchange(t, address, post("/dialstatus/", form, header))[:3]
	}
	check(t, "a header below 16 KiB", status("", "X: "+strings.Repeat("a", 16000)), "200")
	check(t, "a header above 16 KiB", status("", "X: "+strings.Repeat("a", 16500)), "431")
	check(t, "a body above 16 KiB", status(strings.Repeat("a", 16<<10+1), "X: a"), "413")
	check(t, "time for an answer", server.Config.WriteTimeout, 15*time.Second)
	check(t, "time for an idle connection", server.Config.IdleTimeout, 620*time.Second)
}

// A panic ends the connection, not the server. The stack is in one record.
func TestPanic(t *testing.T) {
	app := newTestApp(t)
	server := httptest.NewUnstartedServer(nil)
	server.Config = newServer(app.app)
	app.log = nil // so that a report panics; newServer has kept the log as ErrorLog
	server.Start()
	answer, err := http.Post(server.URL+"/dialstatus", "application/x-www-form-urlencoded", nil)
	if err == nil {
		answer.Body.Close()
	}
	check(t, "no answer", errors.Is(err, io.EOF), true)
	check(t, "the server goes on", exchange(t, server.Listener.Addr().String(), get()), probeOK)
	server.Close()
	stack := regexp.MustCompile(`^"level":"ERROR","msg":"http: panic serving .*handleAnswer.*}$`)
	check(t, "record", stack.MatchString(app.logOfRequest()), true)
}

// A record that stdout does not accept is on stderr, after the cause.
func TestLogWriter(t *testing.T) {
	for _, test := range []struct {
		name           string
		accepted       []int  // bytes that the first writes accept; later ones accept all
		stdout, stderr string // CAUSE stands for the record "stdout failed"
	}{
		{name: "nothing is accepted, twice", accepted: []int{0, 0},
			stdout: "three\n", stderr: "CAUSE one\nCAUSE two\n"},
		{name: "a part, then nothing", accepted: []int{2, 0},
			stdout: "on\nthree\n", stderr: "CAUSE one\nCAUSE two\n"},
		{name: "a byte, then the line feed that ends the torn line", accepted: []int{1, 1},
			stdout: "o\nthree\n", stderr: "CAUSE one\nCAUSE two\n"},
		{name: "all but the line feed", accepted: []int{3},
			stdout: "one\ntwo\nthree\n", stderr: "CAUSE one\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			stdout, stderr := &limitedWriter{accepted: test.accepted}, new(limitedWriter)
			writer := &logWriter{stdout: stdout, stderr: stderr}
			for _, record := range []string{"one\n", "two\n", "three\n"} {
				check(t, "bytes", must(io.WriteString(writer, record)), len(record))
				check(t, "writing since", writer.writingSince.Load(), 0)
			}
			check(t, "stdout", stdout.String(), test.stdout)
			const cause = `"level":"ERROR","msg":"stdout failed","cause":"no space left"}`
			stderrLines := strings.Join(records(stderr.String()), "\n") + "\n"
			check(t, "stderr", strings.ReplaceAll(stderrLines, cause+"\n", "CAUSE "), test.stderr)
		})
	}
}

// limitedWriter accepts a part of the first writes, as a full disk does.
type limitedWriter struct {
	bytes.Buffer
	accepted []int
}

func (w *limitedWriter) Write(record []byte) (int, error) {
	if len(w.accepted) == 0 {
		return w.Buffer.Write(record)
	}
	n := w.accepted[0]
	w.accepted = w.accepted[1:]
	w.Buffer.Write(record[:n])
	return n, errors.New("no space left")
}

// Whatever strangers send: no answer is a 5xx, XML is well-formed, and there
// is one record. If a token is set, only authorized requests are served.
func Fuzz(f *testing.F) {
	// The order is: isAction, body, contentType, query, host, proto, ...
	f.Add(true, endedDial, "application/x-www-form-urlencoded", "", "h", "HTTPS, x", "a, b",
		"c2lnbmVk,", "1", "Basic Og==")
	f.Add(false, endedLeg, "application/x-www-form-urlencoded", "a=b&a=a&=", "[::1]:80", "",
		"<\"\xff&", " ,", ".", "Basic !")
	withoutToken := newTestApp(f)
	withLogin := newTestApp(f, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin)
	withToken := newTestApp(f, "PLIVO_AUTH_TOKEN="+testToken, "PUBLIC_URL="+publicURL)
	f.Fuzz(func(t *testing.T, isAction bool, body, contentType, query, host, proto, forwardedHost,
		signature, nonce, login string) {
		path := "/dialstatus/"
		if isAction {
			path = action
		}
		target, err := url.ParseRequestURI(path + "?" + query)
		if err != nil {
			t.Skip("net/http refuses this URL")
		}
		sendAndCheck := func(app *testApp, headers ...string) int {
			r := post(path, body, headers...)
			r.URL = target
			answer := app.send(r)
			// Two records, or none, are not valid JSON.
			if answer.Code >= 500 || !json.Valid(app.logged.Bytes()) {
				t.Errorf("%d %s\nrecord: %s", answer.Code, answer.Body, &app.logged)
			}
			var response struct {
				XMLName xml.Name `xml:"Response"`
			}
			if err := xml.Unmarshal(answer.Body.Bytes(), &response); answer.Code == 200 && err != nil {
				t.Errorf("%v: %s", err, answer.Body)
			}
			return answer.Code
		}
		headers := []string{"Content-Type: " + contentType, "Host: " + host,
			"X-Forwarded-Proto: " + proto, "X-Forwarded-Host: " + forwardedHost, v3Name + signature,
			v3MainName + signature, nonceName + nonce, "Authorization: " + login}
		sendAndCheck(withoutToken, headers...)
		check(t, "served without authorization", sendAndCheck(withLogin, headers...) == 200, false)
		signature = plivoSignature(testToken, publicURL+path+"?"+target.RawQuery, body, testNonce)
		signed := []string{v3Name + signature, nonceName + testNonce}
		check(t, "refused though it is signed", sendAndCheck(withToken, signed...) == 403, false)
	})
}

func TestStartRecords(t *testing.T) {
	const exampleWarning = "DIAL_TO is not set, or is the example number: " +
		"no real number will be dialled"
	const noTokenWarning = "PLIVO_AUTH_TOKEN is not set: every request is accepted. " +
		"PHLO_BASIC_AUTH alone protects nothing"
	for _, test := range []struct {
		name                string
		variables, warnings []string
	}{
		{name: "no DIAL_TO, no token", variables: []string{"HOST="}, // launch sets 127.0.0.1
			warnings: []string{exampleWarning, noTokenWarning}},
		{name: "the example", variables: []string{"DIAL_TO=+12025550123", "PLIVO_AUTH_TOKEN=x"},
			warnings: []string{exampleWarning}},
		{name: "only PHLO's login", variables: []string{"DIAL_TO=+12025550143", "PHLO_BASIC_AUTH=a:b"},
			warnings: []string{noTokenWarning}},
		{name: "production, and a socket for another process", variables: []string{
			"DIAL_TO=+12025550123,+12025550143", "PLIVO_AUTH_TOKEN=x", "PUBLIC_URL=https://h",
			"MARTINI_ENV=production", "LISTEN_PID=1"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			server := start(t, process{variables: test.variables})
			want := []string{logLine(slog.LevelInfo, "listening", "address", server.address)}
			for _, warning := range test.warnings {
				want = append(want, logLine(slog.LevelWarn, warning))
			}
			check(t, "probe", exchange(t, server.address, get()), probeOK)
			listensEverywhere := !strings.HasPrefix(server.address, "127.0.0.1:")
			check(t, "listens everywhere", listensEverywhere, slices.Contains(test.variables, "HOST="))
			check(t, "log", strings.Join(records(content(server.stdout)), "\n"), strings.Join(want, "\n"))
		})
	}
}

const help = `dialstatus takes no arguments. These variables configure it:
DIAL_TO (default "+12025550123")
    E.164 numbers (country code first) and sip: URIs to dial, separated by commas
CALLER_ID (default "")
    the number that the called phone shows, an E.164 number of your Plivo account
DIAL_TIMEOUT (default "")
    the time for which phones ring, in whole seconds, at least 1
PUBLIC_URL (default "")
    the http or https URL at which Plivo reaches this server, without /dialstatus/
CALLBACK_CONFIG (default "")
    Plivo's rules for repeating a failed report, such as rc=3&rp=5xx,ct,rt
HOST (default "")
    the name or IP address at which the server listens, without a port
PORT (default "8080")
    the number of the port at which the server listens, or 0 for any free port
PLIVO_AUTH_TOKEN (default "")
    the auth token with which Plivo signs requests, without quotes or white space
PHLO_BASIC_AUTH (default "")
    user:password that PHLO sends instead of a signature, without quotes around it
MARTINI_ENV (default "development")
    development, test or production; production needs DIAL_TO, PUBLIC_URL and PLIVO_AUTH_TOKEN
`

func TestServerDoesNotStart(t *testing.T) {
	occupied, _ := listenerAndSocket(t)
	_, port, _ := net.SplitHostPort(occupied.Addr().String())
	client := must(net.Dial("tcp", occupied.Addr().String()))
	defer client.Close()
	notListening := must(client.(*net.TCPConn).File())
	defer notListening.Close()
	const listenError = "can't listen (see HOST and PORT, or the socket of systemd): "
	for _, test := range []struct {
		name   string
		server process
		status int
		stderr string
	}{
		{name: "help", server: process{argument: "-h"}, status: 0, stderr: help},
		{name: "an argument", server: process{argument: "TOKEN=s3cret"}, status: 2, stderr: help},
		{name: "an option", server: process{argument: "-s3cret"}, status: 2, stderr: help},
		{name: "a bad value", server: process{variables: []string{"PORT=http"}}, status: 1,
			stderr: "PORT \"http\": it must be the number of the port at which the server listens, " +
				"or 0 for any free port\n"},
		{name: "the port is in use", server: process{variables: []string{"PORT=" + port}}, status: 1,
			stderr: listenError + "listen tcp 127.0.0.1:" + port + ": bind: address already in use\n"},
		{name: "a file as the socket", server: process{socket: emptyFile(t)}, status: 1,
			stderr: listenError + "file file+net socket of systemd: getsockopt: " +
				"socket operation on non-socket\n"},
		{name: "the socket of a client", server: process{socket: notListening}, status: 1,
			stderr: "accept tcp " + client.LocalAddr().String() + ": accept4: invalid argument\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := launch(t, test.server)
			<-server.ended
			check(t, "status", server.ProcessState.ExitCode(), test.status)
			check(t, "stderr", content(server.stderr), test.stderr)
			// Stdout is not always empty: the last row logs "listening".
			check(t, "also on stdout", strings.Contains(content(server.stdout), test.stderr), false)
		})
	}
}

// A report is not lost, and the call goes on, when stdout is closed.
func TestClosedStdout(t *testing.T) {
	reader, stdout := pipe(t)
	reader.Close()
	server := start(t, process{output: stdout})
	check(t, "answer", exchange(t, server.address, post(action, endedDial)), "200 "+hangupDocument)
	check(t, "reports on stderr", strings.Count(content(server.stderr), `"msg":"dial"`), 1)
}

// A client that sends too slowly gets a 400, and the connection is closed:
// after 5 s in the header, and after 10 s in the body.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	server := start(t, process{})
	for _, test := range []struct{ sent, closedAfter, answer string }{
		{sent: requestHeader[:50], closedAfter: "5s", answer: "HTTP/1.1 400"},
		{sent: requestHeader, closedAfter: "10s", answer: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400"},
	} {
		t.Run(test.closedAfter, func(t *testing.T) {
			t.Parallel()
			client, began := server.connect(t), time.Now()
			io.WriteString(client, test.sent)
			// One more byte must not give more time.
			time.AfterFunc(4*time.Second, func() { io.WriteString(client, "a") })
			answer, _ := io.ReadAll(client.reader)
			untilStatus, _, _ := strings.Cut(string(answer), " Bad Request")
			check(t, "time", time.Since(began).Round(time.Second).String(), test.closedAfter)
			check(t, "answer", untilStatus, test.answer)
		})
	}
}

// After a signal, requests that have begun are answered, and so are requests
// that begin before the server has stopped. Supervisors may repeat a signal.
func TestStop(t *testing.T) {
	t.Parallel()
	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			server := start(t, process{})
			neverFinished, late, kept := server.connect(t), server.connect(t), server.connect(t)
			neverFinished.sendHeader(t) // the body will never come
			late.sendHeader(t)          // the body will come at the last moment
			kept.sendHeader(t)          // later, another request will come
			kept.sendBody(t, answerKeepsOpen)
			signalled := time.Now()
			for range 3 { // as some supervisors do
				server.Process.Signal(signal)
				time.Sleep(10 * time.Millisecond)
			}
			waitFor(t, "the record of the stop", func() bool {
				return strings.Contains(content(server.stdout), `"level":"INFO","msg":"stopping"`)
			})
			kept.sendHeader(t)
			kept.sendBody(t, answerCloses)
			probe := server.connect(t)
			io.WriteString(probe, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
			probe.checkAnswer(t, probeOK, answerCloses)
			silent := server.connect(t) // sends a request after the listener has closed
			waitFor(t, "the listener to close", func() bool { return !canConnect(server.address) })
			check(t, "it listened for a second", time.Since(signalled) >= time.Second, true)
			silent.sendHeader(t)
			silent.sendBody(t, answerCloses)
			time.Sleep(time.Until(signalled.Add(2900 * time.Millisecond))) // stop takes 3,300 at most
			late.sendBody(t, answerCloses)
			<-server.ended
			check(t, "status", server.ProcessState.String(), "exit status 0")
			check(t, "stderr", content(server.stderr), "")
			stdout := content(server.stdout)
			check(t, "reports", strings.Count(stdout, `"msg":"dial"`), 4) // 2 kept, 1 silent, 1 late
			check(t, "last record", records(stdout)[len(records(stdout))-1], logLine(slog.LevelWarn,
				"some connections are cut off: they have not finished a request",
				"cause", context.DeadlineExceeded))
		})
	}
}

// systemd holds the socket: a call that comes while no process runs is
// answered by the next process. HOST and PORT are not used.
func TestSocketOfSystemd(t *testing.T) {
	t.Parallel()
	listener, socket := listenerAndSocket(t)
	first := start(t, process{socket: socket})
	check(t, "address", first.address, listener.Addr().String())
	first.terminate()
	check(t, "end", first.ProcessState.String(), "exit status 0")
	afterTheStart := strings.Join(records(content(first.stdout))[3:], "\n") // 3 are of the start
	check(t, "log after the start", afterTheStart, logLine(slog.LevelInfo, "stopping"))
	client := first.connect(t) // to the socket: first has ended
	io.WriteString(client, requestHeader)
	second := start(t, process{socket: socket})
	client.checkAnswer(t, "100 ", answerKeepsOpen)
	client.sendBody(t, answerKeepsOpen)
	check(t, "reports of the second process",
		strings.Count(content(second.stdout), `"msg":"dial"`), 1)
}

// A pipe that nobody reads gets full. Then records wait, and requests wait for
// the records. The probe says so, and a signal still ends the process.
func TestFullPipe(t *testing.T) {
	t.Parallel()
	reader, stdout := pipe(t)
	// The log is not read for now, so the address comes from the socket.
	listener, socket := listenerAndSocket(t)
	server := launch(t, process{output: stdout, socket: socket})
	server.address = listener.Addr().String()
	check(t, "probe at the start", exchange(t, server.address, get()), probeOK)
	impatient := http.Client{Timeout: 500 * time.Millisecond}
	// fill sends reports until one gets no answer, and returns how many.
	fill := func() (sent int) {
		for {
			sent++
			answer, err := impatient.PostForm("http://"+server.address+"/dialstatus/",
				url.Values{"From": {strings.Repeat("a", 256)}, "To": {strings.Repeat("a", 256)}})
			if err != nil {
				return sent
			}
			answer.Body.Close()
		}
	}
	sent := fill()
	stuckSince := time.Now().Add(-impatient.Timeout)
	check(t, "probe before 4 s", exchange(t, server.address, get()), probeOK)
	waitFor(t, "status 503", func() bool {
		return exchange(t, server.address, get()) == "503 the log accepts no records\n"
	})
	check(t, "time until then", time.Since(stuckSince).Round(time.Second), 4*time.Second)
	reader.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	logged, _ := io.ReadAll(reader)
	check(t, "reports that were read", strings.Count(string(logged), `"msg":"call"`), sent)
	check(t, "probe when the pipe has been read", exchange(t, server.address, get()), probeOK)
	fill()
	check(t, "end", server.terminate(), "exit status 1 after about 4 s")
}

// If the pipe is full at the start, a signal ends the process, too.
func TestFullPipeAtStart(t *testing.T) {
	t.Parallel()
	_, stdout := pipe(t)
	stdout.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	stdout.Write(make([]byte, 1<<20)) // more than a pipe holds
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	listener.Close() // so that its port is free
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	server := launch(t, process{output: stdout, variables: []string{"PORT=" + port}})
	waitFor(t, "the server to listen", func() bool { return canConnect(listener.Addr().String()) })
	check(t, "end", server.terminate(), "exit status 1 after about 4 s")
}

// guideApp is the app as Plivo's guide writes it.
func guideApp(requestLog io.Writer) http.Handler {
	m := martini.Classic()
	m.Logger(log.New(requestLog, "[martini] ", 0))
	m.Post("/dialstatus/", func(w http.ResponseWriter, r *http.Request) string {
		w.Header().Set("Content-Type", "application/xml")
		response := plivoxml.ResponseElement{Contents: []interface{}{
			new(plivoxml.DialElement).
				SetAction("http://foo.com/dialstatus/action/").SetMethod("POST").SetRedirect(true).
				SetContents([]interface{}{new(plivoxml.NumberElement).SetContents("12025550123")}),
		}}
		return response.String()
	})
	m.Post("/dialstatus/action", func(w http.ResponseWriter, r *http.Request) string {
		legs := r.FormValue("DialALegUUID") + " " + r.FormValue("DialBLegUUID")
		return r.FormValue("DialStatus") + " " + legs
	})
	return m
}

// Benchmark measures each route: in the guide's app, in this app, and with a
// signature to check. x-guide is the time divided by that of the guide's app.
func Benchmark(b *testing.B) {
	// Package log does no work for io.Discard, so a struct hides io.Discard.
	discard := struct{ io.Writer }{io.Discard}
	withoutToken := newTestApp(b, "PUBLIC_URL="+publicURL)
	withToken := newTestApp(b, "PUBLIC_URL="+publicURL, "PLIVO_AUTH_TOKEN="+testToken)
	withoutToken.output.stdout = discard
	withToken.output.stdout = discard
	for _, route := range []struct{ name, path, form string }{
		{name: "answer", path: "/dialstatus/", form: newCall},
		{name: "action", path: "/dialstatus/action", form: endedDial},
	} {
		var guideTime float64
		for i, app := range []http.Handler{guideApp(discard), withoutToken, withToken} {
			name := []string{"guide", "dialstatus", "dialstatus-signed"}[i]
			b.Run(route.name+"/"+name, func(b *testing.B) {
				request := signedPost(route.path, route.form)
				w := new(httptest.ResponseRecorder) // without a body to write to
				b.ReportAllocs()
				for b.Loop() {
					r := *request
					r.Form, r.PostForm, r.Body = nil, nil, io.NopCloser(strings.NewReader(route.form))
					app.ServeHTTP(w, &r)
				}
				check(b, "status", w.Code, 200)
				nsPerOp := float64(b.Elapsed()) / float64(b.N)
				if name == "guide" {
					guideTime = nsPerOp
				}
				b.ReportMetric(nsPerOp/guideTime, "x-guide")
			})
		}
	}
}

// The helpers of the tests.

// post returns a form post, such as post("/dialstatus/", "a=1", "Host: h").
// With "Content-Length: unknown", the length of the form is not announced.
func post(target, form string, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, target, strings.NewReader(form))
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		switch name {
		case "Host":
			r.Host = value
		case "Content-Length":
			r.ContentLength = -1
		default:
			r.Header.Add(name, value)
		}
	}
	if r.Header["Content-Type"] == nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	return r
}

// login returns the header of Basic Auth, for a login such as "user:password".
func login(userPassword string) string {
	return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(userPassword))
}

// signedPost returns a form post that Plivo signed for publicURL.
func signedPost(target, form string, headers ...string) *http.Request {
	signature := plivoSignature(testToken, publicURL+target, form, testNonce)
	return post(target, form, append(headers, nonceName+testNonce, v3Name+signature)...)
}

// plivoSignature returns the signature V3 of a POST as Plivo describes it: the
// signed text of https://h/?b=2&a=1 with the form d=4&c=3 and the nonce 5 is
// "https://h/?a=1&b=2.c3d4.5".
func plivoSignature(authToken, calledURL, form, nonce string) string {
	sortedPairs := func(encoded, separator string) (pairs []string) {
		values, _ := url.ParseQuery(encoded)
		for _, name := range slices.Sorted(maps.Keys(values)) {
			for _, value := range slices.Sorted(slices.Values(values[name])) {
				pairs = append(pairs, name+separator+value)
			}
		}
		return pairs
	}
	text, encodedQuery, _ := strings.Cut(calledURL, "?")
	query, fields := sortedPairs(encodedQuery, "="), sortedPairs(form, "")
	switch {
	case len(query) > 0 && len(fields) > 0:
		text += "?" + strings.Join(query, "&") + "." + strings.Join(fields, "")
	case len(query) > 0 || len(fields) > 0:
		text += "?" + strings.Join(query, "&") + strings.Join(fields, "")
	}
	return hmacBase64(authToken, text+"."+nonce)
}

// hmacBase64 returns the HMAC-SHA256 of a text in base64.
func hmacBase64(key, text string) string {
	mac := hmac.New(sha256.New, []byte(key))
	mac.Write([]byte(text))
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// must returns a value that a test needs, and ends all tests if there is none.
func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// check reports an error if two values differ.
func check[T comparable](t testing.TB, name string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s:\n got %v\nwant %v", name, got, want)
	}
}

// logLine returns a line of the log without the time and the { before it:
// logLine(slog.LevelInfo, "call", "From", "1") is
// "level":"INFO","msg":"call","From":"1"}.
func logLine(level slog.Level, message string, attributes ...any) string {
	var line strings.Builder
	slog.New(slog.NewJSONHandler(&line, nil)).Log(context.Background(), level, message, attributes...)
	return records(line.String())[0]
}

// rejectionLine returns the line of a request that was rejected.
func rejectionLine(r *http.Request, baseURL string, status int, reason string) string {
	return logLine(slog.LevelWarn, "rejected", "HTTPStatus", status, "reason", reason,
		"path", r.URL.Path, "calledURL", baseURL+r.URL.RequestURI(), "peer", r.RemoteAddr,
		"X-Forwarded-For", strings.Join(r.Header.Values("X-Forwarded-For"), ", "))
}

var timeOfRecord = regexp.MustCompile(`(?m)^{"time":"20[^"]+",`)

// records splits a log into lines, without the time and the { before it.
func records(logged string) []string {
	return strings.Split(strings.TrimSuffix(timeOfRecord.ReplaceAllString(logged, ""), "\n"), "\n")
}

// environment returns a function like os.Getenv, for variables as NAME=value.
func environment(variables ...string) func(string) string {
	values := make(map[string]string)
	for _, variable := range variables {
		name, value, _ := strings.Cut(variable, "=")
		values[name] = value
	}
	return func(name string) string { return values[name] }
}

// A testApp is the whole app, with the log and the last answer.
type testApp struct {
	*app
	logged bytes.Buffer
	answer *httptest.ResponseRecorder
}

// newTestApp returns an app with variables, such as newTestApp(t, "PORT=0").
func newTestApp(t testing.TB, variables ...string) *testApp {
	t.Helper()
	test := &testApp{answer: httptest.NewRecorder()}
	cfg, err := configure(environment(variables...))
	if err != nil {
		t.Fatal(err)
	}
	test.app = newApp(cfg, &logWriter{stdout: test})
	return test
}

// Write gets the records. One after the answer gets a prefix: checks fail.
func (test *testApp) Write(record []byte) (int, error) {
	if test.answer.Body.Len() > 0 {
		test.logged.WriteString("after the answer: ")
	}
	return test.logged.Write(record)
}

// send empties the log, sends a request, and returns the answer.
func (test *testApp) send(r *http.Request) *httptest.ResponseRecorder {
	test.logged.Reset()
	test.rejectionCount = 0 // so that a rejection is logged
	test.answer = httptest.NewRecorder()
	test.ServeHTTP(test.answer, r)
	return test.answer
}

// logOfRequest returns what the last request left in the log.
func (a *testApp) logOfRequest() string { return strings.Join(records(a.logged.String()), "\n") }

// checkXML sends a request, and checks the answer and the start of the record.
func (test *testApp) checkXML(t *testing.T, r *http.Request, document, recordStart string) {
	t.Helper()
	answer := test.send(r)
	check(t, "status", answer.Code, 200)
	check(t, "content type", answer.Result().Header.Get("Content-Type"), "application/xml")
	check(t, "document", answer.Body.String(), document)
	check(t, "number of records", strings.Count(test.logged.String(), "\n"), 1)
	record := test.logOfRequest()
	check(t, "record", record[:min(len(record), len(recordStart))], recordStart)
}

// checkRejection sends a request, and checks the answer and the record.
func (test *testApp) checkRejection(t *testing.T, r *http.Request, status int, reason string) {
	t.Helper()
	answer := test.send(r)
	check(t, "status", answer.Code, status)
	check(t, "content type", answer.Result().Header.Get("Content-Type"), "text/plain; charset=utf-8")
	check(t, "reason", answer.Body.String(), reason+"\n")
	check(t, "Connection", answer.Result().Header.Get("Connection"), "")
	check(t, "record", test.logOfRequest(), rejectionLine(r, test.baseURL(r), status, reason))
}

// TestMain lets the binary of the tests be the server, if TEST_SERVER is set.
// The server ends when its stdin is closed, so it does not outlive the tests.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_SERVER") == "" {
		flag.Set("test.parallel", "16") // the parallel tests mostly wait
		os.Exit(m.Run())
	}
	if os.Getenv("TEST_SERVER") == "with socket" { // as systemd does
		os.Setenv("LISTEN_PID", fmt.Sprint(os.Getpid()))
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(3)
	}()
	main()
}

// A process is a server. launch and start set the fields after output.
type process struct {
	argument       string
	variables      []string
	socket         *os.File // the socket that systemd passes, if not nil
	output         *os.File // replaces stdout, if not nil
	stdout, stderr *os.File
	*exec.Cmd
	address string
	ended   chan error
}

// launch starts a server, on a free port unless the variables say otherwise.
func launch(t *testing.T, p process) *process {
	p.stdout, p.stderr = emptyFile(t), emptyFile(t)
	p.Cmd = exec.Command(os.Args[0], strings.Fields(p.argument)...)
	p.Cmd.Stdout, p.Cmd.Stderr = cmp.Or(p.output, p.stdout), p.stderr
	// The last two prevent a message on stderr, and a wait of one second.
	p.Env = append([]string{"TEST_SERVER=yes", "HOST=127.0.0.1", "PORT=0",
		"GOCOVERDIR=" + t.TempDir(), "GORACE=atexit_sleep_ms=0"}, p.variables...)
	if p.socket != nil {
		p.Env = append(p.Env, "TEST_SERVER=with socket")
		p.ExtraFiles = []*os.File{p.socket}
	}
	must(p.StdinPipe()) // stays open until the tests end
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	p.ended = make(chan error, 1)
	go func() { p.ended <- p.Wait() }()
	t.Cleanup(func() { p.Process.Kill() })
	time.AfterFunc(20*time.Second, func() { p.Process.Kill() }) // so that no test hangs
	return &p
}

// start launches a server, and waits for the record with the address.
func start(t *testing.T, p process) *process {
	server := launch(t, p)
	listening := regexp.MustCompile(`"msg":"listening","address":"(.*)"`)
	waitFor(t, "the server to listen", func() bool {
		found := listening.FindStringSubmatch(content(server.stdout) + content(server.stderr))
		if found != nil {
			server.address = found[1]
		}
		return found != nil
	})
	return server
}

// terminate sends SIGTERM, and returns how the process has ended, and when.
func (p *process) terminate() string {
	signalled := time.Now()
	p.Process.Signal(syscall.SIGTERM)
	<-p.ended
	return fmt.Sprintf("%v after about %.0f s", p.ProcessState, time.Since(signalled).Seconds())
}

// listenerAndSocket returns a listener, and its socket for another process.
func listenerAndSocket(t *testing.T) (net.Listener, *os.File) {
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	socket := must(listener.(*net.TCPListener).File())
	t.Cleanup(func() { listener.Close(); socket.Close() })
	return listener, socket
}

// pipe returns the two ends of a new pipe.
func pipe(t *testing.T) (reader, writer *os.File) {
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reader.Close(); writer.Close() })
	return reader, writer
}

// waitFor calls isDone until it returns true, for ten seconds at most.
func waitFor(t *testing.T, what string, isDone func() bool) {
	t.Helper()
	for began := time.Now(); !isDone(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatal("waited in vain for ", what)
		}
	}
}

// content returns what has been written to a file.
func content(file *os.File) string {
	return string(must(os.ReadFile(file.Name())))
}

// emptyFile returns a new file that the test removes at its end.
func emptyFile(t *testing.T) *os.File {
	return must(os.CreateTemp(t.TempDir(), ""))
}

// exchange sends a request, and returns status and body, such as "200 ok".
func exchange(t *testing.T, address string, r *http.Request) string {
	t.Helper()
	r.RequestURI = "" // only a server sets it
	r.URL.Scheme, r.URL.Host, r.Close = "http", address, true
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	return fmt.Sprint(answer.StatusCode, " ", string(must(io.ReadAll(answer.Body))))
}

// get returns a probe.
func get() *http.Request { return httptest.NewRequest(http.MethodGet, "/", nil) }

// canConnect reports whether something listens at an address.
func canConnect(address string) bool {
	conn, err := net.Dial("tcp", address)
	if err == nil {
		conn.Close()
	}
	return err == nil
}

// A client is a connection to a server.
type client struct {
	net.Conn
	reader *bufio.Reader
}

// connect opens a connection to the server.
func (p *process) connect(t *testing.T) client {
	conn, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return client{Conn: conn, reader: bufio.NewReader(conn)}
}

// requestHeader is the header of a post of endedDial. The server answers 100
// when it has read the header and waits for the body.
var requestHeader = fmt.Sprintf("POST /dialstatus/action/ HTTP/1.1\r\nHost: h\r\nContent-Type: "+
	"application/x-www-form-urlencoded\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n",
	len(endedDial))

// Whether an answer tells the client to close the connection.
const (
	answerKeepsOpen = false
	answerCloses    = true
)

// sendHeader sends requestHeader, and waits until the server has read it.
func (c client) sendHeader(t *testing.T) {
	t.Helper()
	io.WriteString(c, requestHeader)
	c.checkAnswer(t, "100 ", answerKeepsOpen)
}

// sendBody sends the body after requestHeader, and checks the answer.
func (c client) sendBody(t *testing.T, wantClose bool) {
	t.Helper()
	io.WriteString(c, endedDial)
	c.checkAnswer(t, "200 "+hangupDocument, wantClose)
}

// checkAnswer reads an answer and compares status and body, such as "200 ok".
func (c client) checkAnswer(t *testing.T, statusAndBody string, wantClose bool) {
	t.Helper()
	answer, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		t.Error("no answer: ", err)
		return
	}
	defer answer.Body.Close()
	check(t, "answer", fmt.Sprint(answer.StatusCode, " ", string(must(io.ReadAll(answer.Body)))),
		statusAndBody)
	check(t, "the answer closes the connection", answer.Close, wantClose)
}
