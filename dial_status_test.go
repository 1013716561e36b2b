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

// Requests as Plivo sends them, modelled on captured traffic.
const (
	aLeg = "38cb006a-e25d-4455-9862-27550dbea7e9"
	bLeg = "c0a58e17-9d24-4f6b-8a13-72e5b4c9d806"

	ringingCall = "BillRate=0.005&CallStatus=ringing&CallUUID=" + aLeg + "&CountryCode=US" +
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
	endedCall = "AnswerTime=2024-10-25+14%3A13%3A41&BillDuration=60&BillRate=0.005" +
		"&CallStatus=completed&CallUUID=" + aLeg + "&Direction=inbound&Duration=14" +
		"&EndTime=2024-10-25+14%3A13%3A55&Event=Hangup&From=12025550123&HangupCause=NORMAL_CLEARING" +
		"&HangupCauseCode=4000&HangupCauseName=Normal+Hangup&HangupSource=Caller" +
		"&ParentAuthID=MAXXXXXXXXXXXXXXXXXX&SessionStart=2024-10-25+14%3A13%3A37.779297" +
		"&StartTime=2024-10-25+14%3A13%3A37&To=12025550199"
)

// keys are those of each record, in their order.
var keys = map[string][]string{
	"call": {"CallUUID", "From", "To", "Direction", "CallStatus"},
	"leg": {"DialAction", "DialALegUUID", "DialBLegUUID", "DialBLegTo", "DialBLegStatus",
		"DialBLegDuration", "DialBLegHangupCause", "DialBLegHangupCauseName",
		"DialBLegHangupSource", "CallUUID"},
	"dial": {"DialStatus", "DialALegUUID", "DialBLegUUID", "DialRingStatus", "DialHangupCause",
		"CallUUID", "From", "To"},
	"hangup": {"CallUUID", "From", "To", "Direction", "CallStatus", "HangupCause",
		"HangupCauseName", "HangupSource", "Duration"},
}

const (
	nothing = `<Response></Response>`
	hangsUp = `<Response><Hangup></Hangup></Response>`
	dials   = dialTag + dialURL + `<Number>+12025550123</Number></Dial></Response>`
	dialTag = `<Response><Dial action="http://example.com/dialstatus/action/" method="POST" `
	dialURL = `callbackUrl="http://example.com/dialstatus/" callbackMethod="POST" redirect="true">`

	calls      = `{"level":"INFO","msg":"call"`
	completed  = `{"level":"INFO","msg":"dial","DialStatus":"completed","DialALegUUID":"` + aLeg + `"`
	urlencoded = "application/x-www-form-urlencoded"
	tooLong    = "the body is too long: send 16384 bytes at most"
	notAForm   = "this is not a form: send application/x-www-form-urlencoded"
	noDecode   = "this does not decode: send %25 for %, %3B for ;"
	noStatus   = "no DialStatus: send the form that Plivo posts here"
	forged     = "forbidden: Plivo has not signed this. If it called another URL, set PUBLIC_URL; " +
		"if not, PLIVO_AUTH_TOKEN is not that of the number's account"
)

// says is the document that says a sentence and hangs up.
func says(sentence string) string {
	return `<Response><Speak>` + sentence + `</Speak><Hangup></Hangup></Response>`
}

// with is a form in which one field has another value.
func with(form, name, value string) string {
	return regexp.MustCompile(`\b`+name+`=[^&]*`).ReplaceAllLiteralString(form, name+"="+value)
}

// long is a text of n bytes.
func long(n int) string { return strings.Repeat("a", n) }

// logged is the line that the log has of a record, without its time.
func logged(level slog.Level, message string, attributes ...any) string {
	var line strings.Builder
	slog.New(slog.NewJSONHandler(&line, nil)).Log(context.Background(), level, message, attributes...)
	return lines(line.String())[0]
}

// record is the line of a form.
func record(message, form string) string {
	values, _ := url.ParseQuery(form)
	var attributes []any
	for _, key := range keys[message] {
		attributes = append(attributes, key, values.Get(key))
	}
	return logged(slog.LevelInfo, message, attributes...)
}

// rejected is the line of a request that was not served.
func rejected(r *http.Request, baseURL string, status int, reason string) string {
	return logged(slog.LevelWarn, "rejected", "status", status, "reason", reason, "path", r.URL.Path,
		"url", baseURL+r.URL.RequestURI(), "peer", r.RemoteAddr,
		"X-Forwarded-For", strings.Join(r.Header.Values("X-Forwarded-For"), ", "))
}

var timeKey = regexp.MustCompile(`"time":"[^"]*",`)

// lines splits a log into its records, without their time.
func lines(log string) []string {
	return strings.Split(strings.TrimSuffix(timeKey.ReplaceAllString(log, ""), "\n"), "\n")
}

// environment looks up the variables of a list of NAME=value.
func environment(variables ...string) func(string) string {
	values := make(map[string]string)
	for _, variable := range variables {
		name, value, _ := strings.Cut(variable, "=")
		values[name] = value
	}
	return func(name string) string { return values[name] }
}

// testApp is the whole app. It keeps its log, and what was in it when the last
// answer began.
type testApp struct {
	*app
	log   bytes.Buffer
	begun string
}

func newTestApp(t testing.TB, variables ...string) *testApp {
	t.Helper()
	cfg, err := configure(environment(variables...))
	if err != nil {
		t.Fatal(err)
	}
	test := new(testApp)
	test.app = newApp(cfg, slog.New(slog.NewJSONHandler(&test.log, nil)))
	return test
}

// send answers a request as if no other had been rejected before it, and
// returns what the app had logged when it began to answer.
func (test *testApp) send(r *http.Request) (answer *httptest.ResponseRecorder, log string) {
	test.log.Reset()
	test.rejections = 0
	answer = httptest.NewRecorder()
	test.ServeHTTP(recorder{answer, test}, r)
	return answer, test.begun
}

type recorder struct {
	*httptest.ResponseRecorder
	test *testApp
}

func (w recorder) WriteHeader(status int) {
	w.test.begun = w.test.log.String()
	w.ResponseRecorder.WriteHeader(status)
}

// want sends a request, and checks status, type and text of the answer, and how
// the one record begins. What is not XML is one plain line.
func (test *testApp) want(t *testing.T, r *http.Request, status int, text, record string) {
	t.Helper()
	answer, log := test.send(r)
	contentType := "application/xml"
	if !strings.HasPrefix(text, "<") {
		contentType, text = "text/plain; charset=utf-8", text+"\n"
	}
	if got := answer.Result().Header.Get("Content-Type"); answer.Code != status || got != contentType {
		t.Errorf("answer: %d %q, want %d %q", answer.Code, got, status, contentType)
	}
	if answer.Body.String() != text {
		t.Errorf("answer:\n got %s\nwant %s", answer.Body, text)
	}
	if got := lines(log); len(got) != 1 || !strings.HasPrefix(got[0], record) {
		t.Errorf("log:\n got %s\nwant %s", log, record)
	}
}

// wantRejection is want for a request that is not served.
func (test *testApp) wantRejection(t *testing.T, r *http.Request, status int, reason string) {
	t.Helper()
	test.want(t, r, status, reason, rejected(r, test.baseURL(r), status, reason))
}

type sent struct {
	name string
	app  *testApp
	*http.Request
}

// post makes a form post, with more headers as "Name: value". "Host:" sets the
// host; a header that is there already gets a second line.
func post(target, form string, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, target, strings.NewReader(form))
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		if name == "Host" {
			r.Host = value
		} else {
			r.Header.Add(name, value)
		}
	}
	if r.Header["Content-Type"] == nil {
		r.Header.Set("Content-Type", urlencoded)
	}
	return r
}

func TestAnswerURL(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ name, form, document, record string }{
		{"a call reaches the number", ringingCall, dials, "call"},
		{"an event of something else", "Event=DialHangup&CallStatus=in-progress", dials, "call"},
		{"in another case", "Event=hangup&CallStatus=Completed", dials, "call"},
		{"a called leg answers", with(endedLeg, "DialAction", "answer"), nothing, "leg"},
		{"a called leg has ended", endedLeg, nothing, "leg"},
		{"a leg before the end of the call", "DialAction=x&Event=Hangup", nothing, "leg"},
		{"the call is over", endedCall, nothing, "hangup"},
		{"over, whatever the status is", "DialAction=&Event=Hangup&CallStatus=x", nothing, "hangup"},
		{"final: completed", "CallStatus=completed", nothing, "hangup"},
		{"final: busy", "CallStatus=busy", nothing, "hangup"},
		{"final: failed", "CallStatus=failed", nothing, "hangup"},
		{"final: timeout", "CallStatus=timeout", nothing, "hangup"},
		{"final: no-answer", "CallStatus=no-answer", nothing, "hangup"},
		{"final: cancel", "CallStatus=cancel", nothing, "hangup"},
	} {
		t.Run(test.name, func(t *testing.T) {
			record := `{"level":"INFO","msg":"` + test.record + `"`
			app.want(t, post("/dialstatus/", test.form), 200, test.document, record)
			app.want(t, post("/dialstatus?"+test.form, ""), 200, test.document, record)
		})
	}
}

func TestActionURL(t *testing.T) {
	app := newTestApp(t)
	for status, document := range map[string]string{
		"completed": hangsUp,
		"cancel":    hangsUp,
		"busy":      says("The line is busy. Please try again later."),
		"no-answer": says("Nobody answered. Please try again later."),
		"timeout":   says("The call could not be connected in time. Please try again later."),
		"failed":    says("The call could not be connected."),
		"Completed": says("The call has ended."),
	} {
		t.Run(status, func(t *testing.T) {
			form, level := with(endedDial, "DialStatus", status), "INFO"
			if status == "Completed" {
				level = "WARN"
			}
			record := `{"level":"` + level + `","msg":"dial","DialStatus":"` + status + `"`
			app.want(t, post("/dialstatus/action", form), 200, document, record)
		})
	}
	t.Run("no DialStatus", func(t *testing.T) {
		app.wantRejection(t, post("/dialstatus/action/", ringingCall), 400, noStatus)
	})
}

// A report is the same however its fields are sent.
func TestFields(t *testing.T) {
	app := newTestApp(t)
	const path = "/dialstatus/action/"
	busy := path + "?" + with(endedDial, "DialStatus", "busy")
	for name, r := range map[string]*http.Request{
		"with a slash at its end": post(path, endedDial),
		"a type in capitals":      post(path, endedDial, strings.ToUpper("Content-Type: "+urlencoded)),
		"a type with parameters":  post(path, endedDial, "Content-Type: "+urlencoded+" ; charset"),
		"in the query":            post(path+"?"+endedDial, "", "Content-Type: application/json"),
		"in both: the body":       post(busy, endedDial),
		"some in each":            post(busy, "DialStatus=completed"),
		"two values: the first":   post(path, endedDial+"&DialStatus=busy"),
		"the longest body":        post(path, endedDial+"&x="+long(16<<10-len(endedDial)-3)),
	} {
		t.Run(name, func(t *testing.T) { app.want(t, r, 200, hangsUp, completed) })
	}
}

func TestDialDocument(t *testing.T) {
	const number, start = "<Number>+12025550123</Number>", dialTag + dialURL
	for _, test := range []struct{ variable, document string }{
		{"DIAL_TO=9902555", start + "<Number>9902555</Number>"},
		{"DIAL_TO=+120255501234567", start + "<Number>+120255501234567</Number>"},
		{"DIAL_TO=+12025550101,\t sip:a.b@h ,+12025550102\n", start + "<Number>+12025550101</Number>" +
			"<User>sip:a.b@h</User><Number>+12025550102</Number>"},
		{"DIAL_TO=sip:!o'#$%&*()/+-:;=?A[~@[::1];a=1&b", start +
			"<User>sip:!o&#39;#$%&amp;*()/+-:;=?A[~@[::1];a=1&amp;b</User>"},
		{"DIAL_TIMEOUT=1", dialTag + `timeout="1" ` + dialURL + number},
		{"DIAL_TIMEOUT=100000000", dialTag + `timeout="100000000" ` + dialURL + number},
		{"CALLER_ID=+12025550150", dialTag + `callerId="+12025550150" ` + dialURL + number},
	} {
		t.Run(test.variable, func(t *testing.T) {
			newTestApp(t, test.variable).want(t, post("/dialstatus/", ringingCall), 200,
				test.document+"</Dial></Response>", calls)
		})
	}
}

// The URLs in the Dial document, and the one in the record of a rejection, begin
// with the one by which Plivo reached the server.
func TestBaseURL(t *testing.T) {
	const (
		public = "PUBLIC_URL=https://calls.example.org:8443/plivo/"
		tunnel = "X-Forwarded-Host: abc.ngrok.app"
		odd    = `a_b.<"x">&'/?#@%.`
	)
	for _, test := range []struct {
		name, publicURL string
		headers         []string
		base            string
	}{
		{"curl", "", []string{"Host: localhost:8080"}, "http://localhost:8080"},
		{"IPv6", "", []string{"Host: [::1]:80"}, "http://[::1]"},
		{"ngrok", "", []string{"Host: localhost:8080", https, tunnel}, "https://abc.ngrok.app"},
		{"two proxies", "", []string{"X-Forwarded-Proto: HTTPS , http",
			"X-Forwarded-Host: Calls.Example.org:8443 , inner:80"}, "https://Calls.Example.org:8443"},
		{"only the scheme is forwarded", "", []string{https}, "https://example.com"},
		{"an empty host is forwarded", "", []string{"X-Forwarded-Host:  "}, "http://example.com"},
		{"ftp", "", []string{"X-Forwarded-Proto: ftp", tunnel + ":443"}, "http://abc.ngrok.app:443"},
		{"https and its port", "", []string{https, tunnel + ":443"}, "https://abc.ngrok.app"},
		{"https and another's port", "", []string{https, tunnel + ":4430"}, "https://abc.ngrok.app:4430"},
		{"a port that ends alike", "", []string{tunnel + ":8080"}, "http://abc.ngrok.app:8080"},
		{"no Host", "", []string{"Host: "}, "http://"},
		{"characters that XML escapes", "", []string{"X-Forwarded-Host: " + odd}, "http://" + odd},
		{"PUBLIC_URL, whatever strangers say", public, []string{"Host: evil.example", https, tunnel},
			"https://calls.example.org:8443/plivo"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var base strings.Builder
			xml.EscapeText(&base, []byte(test.base))
			app := newTestApp(t, test.publicURL)
			app.want(t, post("/dialstatus/", ringingCall, test.headers...), 200,
				strings.ReplaceAll(dials, "http://example.com", base.String()), calls)
			r := post("/dialstatus/action?a=b", "", test.headers...)
			app.want(t, r, 400, noStatus, rejected(r, test.base, 400, noStatus))
		})
	}
}

func TestNotServed(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ method, target, allow string }{
		{"GET", "/dialstatus/", "POST"},
		{"PUT", "/dialstatus/action", "POST"},
		{"POST", "/", "GET"},
		{"POST", "/dialstatus/x", ""},
		{"GET", "/dial_status.go", ""},
	} {
		t.Run(test.method+" "+test.target, func(t *testing.T) {
			status := map[bool]int{true: 405, false: 404}[test.allow != ""]
			r := httptest.NewRequest(test.method, test.target, nil)
			r.Header["X-Forwarded-For"] = []string{"192.0.2.1, 192.0.2.2", "192.0.2.3"}
			app.wantRejection(t, r, status, "dialstatus runs, but takes no "+test.method+
				" here: send POST to /dialstatus/ or /dialstatus/action/, such as curl"+
				" -d CallStatus=ringing http://example.com/dialstatus/")
			answer, _ := app.send(r)
			if allow := answer.Result().Header.Get("Allow"); allow != test.allow {
				t.Errorf("Allow: %q, want %q", allow, test.allow)
			}
		})
	}
}

// A probe is answered, and leaves no record.
func TestProbe(t *testing.T) {
	app := newTestApp(t)
	answer, _ := app.send(httptest.NewRequest(http.MethodHead, "/", nil))
	const line = "dialstatus runs, and takes calls at /dialstatus/\n"
	if answer.Code != 200 || answer.Body.String() != line || app.log.Len() > 0 {
		t.Errorf("%d %s, log: %s", answer.Code, answer.Body, &app.log)
	}
}

func TestBadInput(t *testing.T) {
	app := newTestApp(t)
	const path = "/dialstatus/?a=b"
	for _, test := range []struct {
		name   string
		sent   *http.Request
		status int
		reason string
	}{
		{"a byte too long", post(path, long(16<<10+1)), 413, tooLong},
		{"JSON", post(path, "1", "Content-Type: application/json"), 415, notAForm},
		{"another type", post(path, "a=b", "Content-Type: "+urlencoded+"2"), 415, notAForm},
		{"a semicolon in the body", post(path, "a=b;c"), 400, noDecode},
		{"the query does not decode", post("/dialstatus/?a=%zz", "a=b"), 400, noDecode},
	} {
		t.Run(test.name, func(t *testing.T) { app.wantRejection(t, test.sent, test.status, test.reason) })
	}
	t.Run("a body that breaks off", func(t *testing.T) {
		r := post(path, ringingCall)
		r.Body = io.NopCloser(io.MultiReader(r.Body, iotest.ErrReader(io.ErrUnexpectedEOF)))
		app.wantRejection(t, r, 400, "the body broke off: send all of it, at once")
	})
	t.Run("a long body is not read to its end", func(t *testing.T) {
		r, body := post(path, ""), strings.NewReader(long(1<<20))
		r.Body = io.NopCloser(body)
		app.wantRejection(t, r, 413, tooLong)
		if read := 1<<20 - body.Len(); read > 16<<10+1 {
			t.Errorf("read %d bytes", read)
		}
	})
}

// Each record has its fields, and is below 16 KiB, where Docker splits a line.
func TestRecords(t *testing.T) {
	app := newTestApp(t)
	controls := strings.Repeat("\x01", 256) + "a" // each has six bytes in JSON
	for message, test := range map[string]struct{ target, form string }{
		"call":   {"/dialstatus/", with(ringingCall, "From", "+%22%FF%0A")},
		"leg":    {"/dialstatus/", endedLeg},
		"hangup": {"/dialstatus/?Event=Hangup", endedCall},
		"dial":   {"/dialstatus/action/", endedDial},
	} {
		t.Run(message, func(t *testing.T) {
			_, log := app.send(post(test.target, test.form))
			if want := record(message, test.form); lines(log)[0] != want {
				t.Errorf("log:\n got %s\nwant %s", log, want)
			}
			values := make(url.Values)
			for _, field := range keys[message] {
				values.Set(field, controls)
			}
			_, log = app.send(post(test.target, values.Encode()))
			if n := strings.Count(log, `\u0001`); n != 256*len(keys[message]) || len(log) > 16<<10 {
				t.Errorf("a record of %d bytes, with %d controls: %.99s", len(log), n, log)
			}
		})
	}
	for name, r := range map[string]*http.Request{
		"path":            post("/"+strings.Repeat("%01", 4000), ""),
		"query":           post("/?"+strings.Repeat("%01", 4000), ""),
		"method":          httptest.NewRequest(long(12000), "/", nil),
		"X-Forwarded-For": post("/", "", "X-Forwarded-For: "+strings.Repeat(controls, 40)),
	} {
		t.Run(name, func(t *testing.T) {
			if answer, log := app.send(r); len(log) > 8<<10 || answer.Body.Len() > 257 {
				t.Errorf("a record of %d bytes, an answer of %d", len(log), answer.Body.Len())
			}
		})
	}
}

// A flood of requests that are not served leaves 20 records in a second; it
// does not touch reports.
func TestFlood(t *testing.T) {
	t.Parallel()
	app := newTestApp(t)
	for range 2 {
		time.Sleep(time.Until(time.Now().Truncate(time.Second).Add(time.Second)))
		app.log.Reset()
		var senders sync.WaitGroup
		for range 100 {
			senders.Add(1)
			go func() {
				app.ServeHTTP(httptest.NewRecorder(), post("/", ""))
				app.ServeHTTP(httptest.NewRecorder(), post("/dialstatus/action/", endedDial))
				senders.Done()
			}()
		}
		senders.Wait()
	}
	rejections := strings.Count(app.log.String(), `"msg":"rejected"`)
	reports := strings.Count(app.log.String(), `"msg":"dial"`)
	if rejections != 20 || reports != 100 {
		t.Errorf("%d rejections, %d reports", rejections, reports)
	}
}

const (
	testToken = "YzBmZmVlYzBmZmVlYzBmZmVl"
	testLogin = "phlo: pass:word'\"x"
	testNonce = "05429567804466091622"
	publicURL = "https://Calls.example.org"

	https   = "X-Forwarded-Proto: https"
	v3      = "X-Plivo-Signature-V3"
	maV3    = "X-Plivo-Signature-Ma-V3"
	v3Nonce = "X-Plivo-Signature-V3-Nonce"
)

// sign is Plivo's V3 signature of a POST, written from its description: the
// URL, "?" if there is a query or a form, the query and the form sorted by name
// and value with "." between them, "." and the nonce; HMAC-SHA256, base64.
func sign(authToken, called, form, nonce string) string {
	sorted := func(encoded, equals string) (pairs []string) {
		values, _ := url.ParseQuery(encoded)
		for _, name := range slices.Sorted(maps.Keys(values)) {
			for _, value := range slices.Sorted(slices.Values(values[name])) {
				pairs = append(pairs, name+equals+value)
			}
		}
		return pairs
	}
	text, encodedQuery, _ := strings.Cut(called, "?")
	query, fields := sorted(encodedQuery, "="), sorted(form, "")
	if len(query) > 0 || len(fields) > 0 {
		text += "?" + strings.Join(query, "&")
	}
	if len(query) > 0 && len(fields) > 0 {
		text += "."
	}
	return keyedHash(authToken, text+strings.Join(fields, "")+"."+nonce)
}

// keyedHash is the HMAC-SHA256 of a text, in base64.
func keyedHash(authToken, text string) string {
	mac := hmac.New(sha256.New, []byte(authToken))
	mac.Write([]byte(text))
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// signed makes a form post that Plivo signed for publicURL.
func signed(target, form string, headers ...string) *http.Request {
	return post(target, form, append(headers, v3Nonce+": "+testNonce,
		v3+": "+sign(testToken, publicURL+target, form, testNonce))...)
}

// withLogin makes a form post as PHLO's HTTP Request node does with Basic Auth.
func withLogin(user, password string) *http.Request {
	r := post("/dialstatus/action/", endedDial)
	r.SetBasicAuth(user, password)
	return r
}

// The vectors of plivo-go's utils_test.go, TestValidateSignatureV3Pass1 and Pass3.
func TestPublishedSignatures(t *testing.T) {
	const (
		authToken = "Y2Q2ZDgxZmY5YWRiOTI5YmQ1Njg0MTAxZWIyOTc4"
		host      = "https://plivobin.non-prod.plivops.com"
		path      = "/api/v1/validate_signature03.xml"
		uuid      = "3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"
		user      = "sip:PlivoSignature382029104058171078704104@"
	)
	form, _ := url.ParseQuery("ALegRequestUUID=" + uuid + "&ALegUUID=" + uuid + "&BillRate=0.002" +
		"&CallStatus=in-progress&CallUUID=" + uuid + "&Direction=outbound&Event=StartApp" +
		"&From=19792014278&ParentAuthID=MANWVLYTK4ZWU1YTY4QA&RequestUUID=" + uuid +
		"&SIP-H-To=%3C" + user + "52.9.11.55%3Btransport=udp%3E%3Btag=1" +
		"&SessionStart=2020-04-08+11:34:33.238707&To=" + user + "phone-qa.voice.plivodev.com")
	app := newTestApp(t, "PLIVO_AUTH_TOKEN="+authToken, "PUBLIC_URL="+host)
	for target, signature := range map[string]string{
		path + "/?a=b&c=d": "k7Pusd4OxCIjR5IfA9iedDNu/h/gbdYqdzG/MiYtd1c=",
		path:               "iAjE5QqI37mbkYe4w3jTMudqEzbDufdqi7sYwTu64e0=",
	} {
		r := post(target, "", v3+": "+signature, v3Nonce+": 31627761595286130198")
		if r.PostForm = form; !app.authorized(r) {
			t.Errorf("%s: not accepted", target)
		}
	}
}

func TestPlivoMaySend(t *testing.T) {
	const token = "PLIVO_AUTH_TOKEN=" + testToken
	app := newTestApp(t, token, "PHLO_BASIC_AUTH="+testLogin, "PUBLIC_URL="+publicURL+"///")
	tunnelled, open := newTestApp(t, token), newTestApp(t, "PHLO_BASIC_AUTH="+testLogin)

	const action, query = "/dialstatus/action/", "/dialstatus/action/?a=b"
	const other = "c2lnbmVk" // a signature with another token
	signature := sign(testToken, publicURL+action, endedDial, testNonce)
	// withHeaders makes a post of endedDial with these headers and the nonce.
	withHeaders := func(headers ...string) *http.Request {
		return post(action, endedDial, append(headers, v3Nonce+": "+testNonce)...)
	}
	for _, test := range []sent{
		{"answer URL", app, signed("/dialstatus/", ringingCall)},
		{"action URL without its slash", app, signed("/dialstatus/action", endedDial)},
		{"a query", app, signed(action+"?z=1&a=b%20c", endedDial, "Authorization: Basic Og==")},
		{"a repeated name in the query", app, signed(query+"&a=&a=a", "DialStatus=busy")},
		{"repeated fields", app, signed(action, endedDial+strings.Repeat("&To=2&To=1&To=", 200))},
		{"a name that begins another", app, signed(query+"&a-b=1&a1=2", endedDial+"&To-b=1&To1=2")},
		{"a query, and a form that ends in a dot", app, signed(query, endedDial+".")},
		{"empty values", app, signed(query+"&c=&d", endedDial+"&c=&d")},
		{"only an empty pair", app, signed("/dialstatus/", "=")},
		{"only an empty pair in the query", app, signed("/dialstatus/?=", "")},
		{"not ASCII", app, signed(query+"&N=J%C3%BCrgen", endedDial+"&N=%E7%8E%8B%ff\n")},
		{"no form, only a query", app, signed("/dialstatus/action/?DialStatus=busy", "")},
		{"neither form nor query", app, signed("/dialstatus/?", "")},
		{"an escape in the path", app, signed("/dialstatus%2Faction/", endedDial)},
		{"the main account's signature", app, withHeaders(maV3+": "+other, maV3+": "+signature)},
		{"one of several tokens", app, withHeaders(v3 + ": " + other + " , " + signature + " ,")},
		{"a second line", app, withHeaders(v3+": "+other, v3+": "+signature, v3Nonce+": "+testNonce)},
		{"PHLO's login", app, withLogin("phlo", " pass:word'\"x")},
		{"ngrok", tunnelled, signed("/dialstatus/", ringingCall, https, "Host: localhost:8080",
			"X-Forwarded-Host: Calls.example.org")},
		{"without a token anyone", open, withHeaders(v3 + ": " + other)},
	} {
		t.Run(test.name, func(t *testing.T) {
			answer, log := test.app.send(test.Request)
			if answer.Code != 200 || !strings.HasPrefix(answer.Body.String(), "<Response>") {
				t.Errorf("%d %s\nlog: %s", answer.Code, answer.Body, log)
			}
		})
	}
	t.Run("a signature does not change which value counts", func(t *testing.T) {
		r := signed(action, endedDial+"&DialStatus=busy")
		app.want(t, r, 200, hangsUp, completed)
	})
}

// changed makes a forgery of a request: it has its headers, and another target
// or form.
func changed(r *http.Request, target, form string) *http.Request {
	forgery := post(target, form)
	forgery.Header = r.Header
	return forgery
}

func TestForgeries(t *testing.T) {
	const action, query = "/dialstatus/action/", "/dialstatus/action/?a=b"
	app := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin,
		"PUBLIC_URL="+publicURL)
	tunnelled := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken)
	good, goodQuery := signed(action, endedDial), signed(query, endedDial)
	signedWith := func(authToken, nonce string) string {
		return sign(authToken, publicURL+action, endedDial, nonce)
	}
	// withSignature is a post of endedDial.
	withSignature := func(nonce, signature string) *http.Request {
		return post(action, endedDial, v3Nonce+": "+nonce, v3+": "+signature)
	}
	signature := signedWith(testToken, testNonce)
	v2 := keyedHash(testToken, publicURL+action+testNonce)
	for _, test := range []sent{
		{"changed field", app, changed(good, action, with(endedDial, "DialStatus", "busy"))},
		{"added field", app, changed(good, action, endedDial+"&X=")},
		{"added second value", app, changed(good, action, endedDial+"&To=1")},
		{"changed query", app, changed(goodQuery, action+"?a=c", endedDial)},
		{"added query", app, changed(good, query, endedDial)},
		{"dropped query", app, changed(goodQuery, action, endedDial)},
		{"added second value in the query", app, changed(goodQuery, query+"&a=c", endedDial)},
		{"added dots behind a query", app, changed(goodQuery, query, endedDial+"..")},
		{"added dots in the query", app, changed(signed(query, ""), query+"%2E", "")},
		{"other path", app, changed(good, "/dialstatus/", endedDial)},
		{"other escape of the path", app, changed(good, "/dialstatus%2Faction/", endedDial)},
		{"other nonce", app, withSignature("05429567804466091623", signature)},
		{"end of the form in the nonce", app, withSignature("199.0542",
			sign(testToken, publicURL+action, endedDial+".199", "0542"))},
		{"empty nonce", app, withSignature("", signedWith(testToken, ""))},
		{"other token", app, withSignature(testNonce, signedWith("other", testNonce))},
		{"part of the signature", app, withSignature(testNonce, signature[:43])},
		{"more than the signature", app, withSignature(testNonce, signature+"=")},
		{"the signature in another case", app, withSignature(testNonce, strings.ToLower(signature))},
		{"V2's signature", app, post(action, endedDial, "X-Plivo-Signature-V2: "+v2,
			"X-Plivo-Signature-V2-Nonce: "+testNonce)},
		{"unsigned", app, post("/dialstatus/", ringingCall)},
		{"other password", app, withLogin("phlo", " PASS:word'\"x")},
		{"empty login", tunnelled, withLogin("", "")},
		{"a longer password", app, withLogin("phlo", " pass:word'\"x ")},
		{"other scheme", tunnelled, signed(action, endedDial, "Host: Calls.example.org")},
		{"other host", tunnelled, signed(action, endedDial, https, "Host: evil.example")},
	} {
		t.Run(test.name, func(t *testing.T) { test.app.wantRejection(t, test.Request, 403, forged) })
	}
}

func TestConfiguration(t *testing.T) {
	for variable, address := range map[string]string{
		"HOST=::1": "[::1]:8080", "HOST=[::]": "[::]:8080", "HOST=fe80::1%eth-0": "[fe80::1%eth-0]:8080",
		"PORT=0": ":0", "MARTINI_ENV=test": ":8080", "MARTINI_ENV=development": ":8080",
		"PHLO_BASIC_AUTH=ü:x:": ":8080", "PHLO_BASIC_AUTH=x \"y:\"b\"c": ":8080",
		"PUBLIC_URL=http://dialstatus/mydialstatus/dialstatus1": ":8080", "PUBLIC_URL=http://1_": ":8080",
		"PUBLIC_URL=http://[fe80::FFFF:1.2.3.4]:65535/%20~.-_": ":8080",
	} {
		if cfg, err := configure(environment(variable)); cfg.address != address || err != nil {
			t.Errorf("%s: %q, %v", variable, cfg.address, err)
		}
	}
}

func TestConfigurationErrors(t *testing.T) {
	const secret = "(not shown)" // what is, or may hold, a password
	for _, test := range []struct {
		variable, shown string
		values          []string
	}{
		{"DIAL_TO", "", []string{"me", "+120255", "+02025550123", "++12025550123", "+1202555012345678",
			"+1 202 555 0123", "12025550123,", ",12025550123", "12025550123;12025550124",
			"tel:+12025550123", " ", `"+12025550101"`}},
		{"CALLER_ID", "", []string{"Alice", "12025550123,12025550124", "12025550123\n"}},
		{"DIAL_TIMEOUT", "", []string{"0", "-1", "1.5", "30s", "1234567890"}},
		{"PUBLIC_URL", "", []string{"h", "ftp://h", "HTTPS://h", "https://", "https://h:x", "https://h:",
			"https://[::1", "https://[]", "https://[fe80::1%25e]", "https://a*b", "http://h/%zz",
			"https://h/?", "https://h/#", `http://h/a"<b>`, "http://.h", "https://h/dialstatus",
			"https://h/a/dialstatus//", "https://h/dialstatus%2Faction/x"}},
		{"HOST", "", []string{"a b", "localhost\n"}},
		{"PORT", "", []string{"http", "-1", " 80", "80\n"}},
		{"MARTINI_ENV", "", []string{"Production", "production ", "protest", `"production"`}},
		{"DIAL_TO", secret, []string{"sip:user:s3cret@host x", "sip:@b", "sip:a@", "sip:a@b@c",
			"sip:a@bü", "sip:a@b\x7f", "sip:a@b\x01", "sip:a@b\nc", "sip:a@b<", "sip:a>@b",
			`sip:"a"@b`, "sip:a b@c", "sip:a,b@c", "sips:a@b", "SIP:a@b"}},
		{"PUBLIC_URL", secret, []string{"https://s3cret@example.com"}},
		{"PLIVO_AUTH_TOKEN", secret, []string{"s3cret\n", "\ts3cret", "s3 cret", `"s3cret"`, "'s3cret'"}},
		{"PHLO_BASIC_AUTH", secret, []string{"s3;cret", ":s3cret", "s3cret:", "a:b\n", "a:b\rc", "a\nb:c",
			" a:b", "a:b ", `"a:b`, "'a:b", `a:b"`, "a:b'", "\ra:b", "a:b\t", ":a:b"}},
	} {
		for _, value := range test.values {
			_, err := configure(environment(test.variable + "=" + value))
			want := fmt.Sprintf("%s %q: want ", test.variable, cmp.Or(test.shown, value))
			if got := fmt.Sprint(err); !strings.HasPrefix(got, want) || strings.Contains(got, "\n") {
				t.Errorf("%s=%q: got %s, want %s", test.variable, value, got, want)
			}
		}
	}
	_, err := configure(environment("MARTINI_ENV=production", "DIAL_TIMEOUT=x"))
	const notSet = " is not set: MARTINI_ENV=production needs it\n"
	if want := "DIAL_TO" + notSet + `DIAL_TIMEOUT "x": want seconds, at least 1` + "\nPUBLIC_URL" +
		notSet + "PLIVO_AUTH_TOKEN" + notSet; fmt.Sprintln(err) != want {
		t.Errorf("got:\n%v\nwant:\n%s", err, want)
	}
}

// What each limit of the server is for stands in the README.
func TestServerLimits(t *testing.T) {
	server := httptest.NewUnstartedServer(nil)
	server.Config = newServer(newTestApp(t).app)
	server.Start()
	defer server.Close()
	for size, status := range map[int]int{16100: 200, 16500: 431} { // of a header
		r, _ := http.NewRequest(http.MethodGet, server.URL, nil)
		r.Header.Set("X", long(size))
		if answer, err := http.DefaultClient.Do(r); err != nil || answer.StatusCode != status {
			t.Errorf("a header of %d bytes: %v, %v; want %d", size, answer, err, status)
		}
	}
	got := []time.Duration{server.Config.ReadHeaderTimeout, server.Config.ReadTimeout,
		server.Config.WriteTimeout, server.Config.IdleTimeout}
	want := []time.Duration{5 * time.Second, 10 * time.Second, 15 * time.Second, 620 * time.Second}
	if !slices.Equal(got, want) {
		t.Errorf("header, request, answer, idle: %v, want %v", got, want)
	}
}

// pipe takes as many bytes of each Write as it says, and then everything.
type pipe struct {
	bytes.Buffer
	takes []int
}

func (p *pipe) Write(record []byte) (int, error) {
	if len(p.takes) == 0 {
		return p.Buffer.Write(record)
	}
	n := p.takes[0]
	p.takes = p.takes[1:]
	p.Buffer.Write(record[:n])
	return n, errors.New("no space left")
}

// A record that stdout does not take is on stderr, whole, behind the cause.
func TestLogWriter(t *testing.T) {
	for _, test := range []struct {
		name           string
		takes          []int
		stdout, stderr string
	}{
		{"full, then not", []int{0, 0}, "three\n", "!one\n!two\n"},
		{"half a record", []int{2}, "on\ntwo\nthree\n", "!one\n"},
		{"half a record, then none", []int{2, 0}, "on\nthree\n", "!one\n!two\n"},
		{"two halves", []int{2, 3}, "on\ntw\nthree\n", "!one\n!two\n"},
		{"half a record, then the end of its line", []int{2, 1}, "on\nthree\n", "!one\n!two\n"},
		{"all but the end of its line", []int{3}, "one\ntwo\nthree\n", "!one\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			stdout, stderr := &pipe{takes: test.takes}, new(pipe)
			log := &logWriter{stdout: stdout, stderr: stderr}
			for _, record := range []string{"one\n", "two\n", "three\n"} {
				if n, err := io.WriteString(log, record); n != len(record) || err != nil {
					t.Errorf("%q: %d, %v", record, n, err)
				}
			}
			const cause = `{"level":"ERROR","msg":"stdout failed","cause":"no space left"}` + "\n"
			got := strings.ReplaceAll(timeKey.ReplaceAllString(stderr.String(), ""), cause, "!")
			if stdout.String() != test.stdout || got != test.stderr {
				t.Errorf("stdout %q, stderr %q; want %q, %q", stdout, got, test.stdout, test.stderr)
			}
		})
	}
	both := &logWriter{stdout: &pipe{takes: []int{0}}, stderr: &pipe{takes: []int{0, 0}}}
	if _, err := io.WriteString(both, "one\n"); err == nil {
		t.Error("both fail: no error, and the record is nowhere")
	}
}

// Strangers get no 5xx, and XML that is well-formed; each leaves one record. What
// is unsigned where a token is set is not answered, what is signed not forbidden.
func Fuzz(f *testing.F) {
	for _, form := range []string{ringingCall, endedLeg, endedCall, endedDial, "DialStatus=%zz;&="} {
		f.Add(true, form, urlencoded, "", "h", "HTTPS, x", "a, b", "c2lnbmVk,", "1", "Basic Og==")
		f.Add(false, form, "", "a=b&a=a&=", "[::1]:80", "", "<\"\xff&", " ,", ".", "Basic !")
	}
	open := newTestApp(f)
	closed := newTestApp(f, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin)
	configured := newTestApp(f, "PLIVO_AUTH_TOKEN="+testToken, "PUBLIC_URL="+publicURL)
	f.Fuzz(func(t *testing.T, isAction bool, body, contentType, query, host, proto, forwardedHost,
		signature, nonce, login string) {
		path := map[bool]string{false: "/dialstatus/", true: "/dialstatus/action/"}[isAction]
		target, err := url.ParseRequestURI(path + "?" + query)
		if err != nil {
			t.Skip("net/http refuses it")
		}
		send := func(app *testApp, headers ...string) (status int) {
			r := post(path, body, headers...)
			r.URL = target
			answer, log := app.send(r)
			if answer.Code >= 500 || strings.Count(log, "\n") != 1 || !json.Valid([]byte(log)) {
				t.Errorf("%d %s\nlog: %s", answer.Code, answer.Body, log)
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
			"X-Forwarded-Proto: " + proto, "X-Forwarded-Host: " + forwardedHost, v3 + ": " + signature,
			maV3 + ": " + signature, v3Nonce + ": " + nonce, "Authorization: " + login}
		send(open, headers...)
		if send(closed, headers...) == 200 {
			t.Error("answered without a signature")
		}
		signature = sign(testToken, publicURL+path+"?"+target.RawQuery, body, testNonce)
		if send(configured, v3+": "+signature, v3Nonce+": "+testNonce) == 403 {
			t.Error("forbidden though signed")
		}
	})
}

// TestMain lets the test binary be the server itself, until its stdin is closed.
func TestMain(m *testing.M) {
	if os.Getenv("TEST_SERVER") == "" {
		flag.Set("test.parallel", "8") // these tests mostly wait
		os.Exit(m.Run())
	}
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(3)
	}()
	main()
}

// process is a server that runs, or has run.
type process struct {
	*exec.Cmd
	address        string
	stdout, stderr *os.File
	ended          chan error
}

// text is what has been written to a file.
func text(file *os.File) string {
	text, _ := os.ReadFile(file.Name())
	return string(text)
}

// newFile is an empty file.
func newFile(t *testing.T) *os.File {
	file, _ := os.CreateTemp(t.TempDir(), "")
	return file
}

// launch starts the test binary as a server, on a free port unless the
// variables say otherwise, and with this stdout unless it is nil.
func launch(t *testing.T, stdout *os.File, argument string, variables ...string) *process {
	p := &process{Cmd: exec.Command(os.Args[0], strings.Fields(argument)...), stdout: newFile(t),
		stderr: newFile(t), ended: make(chan error, 1)}
	p.Env = append([]string{"TEST_SERVER=yes", "HOST=127.0.0.1", "PORT=0", "GOCOVERDIR=" + t.TempDir(),
		"GORACE=atexit_sleep_ms=0"}, variables...)
	p.Stdout, p.Stderr = cmp.Or(stdout, p.stdout), p.stderr
	_, err := p.StdinPipe()
	if err := errors.Join(err, p.Start()); err != nil {
		t.Fatal(err)
	}
	go func() { p.ended <- p.Wait() }()
	t.Cleanup(func() { p.Process.Kill() })
	time.AfterFunc(20*time.Second, func() { p.Process.Kill() }) // a test fails, and does not hang
	return p
}

// start launches a server, and waits until it listens.
func start(t *testing.T, stdout *os.File, variables ...string) *process {
	p := launch(t, stdout, "", variables...)
	listens := regexp.MustCompile(`"msg":"listening","address":"(.*)"`)
	for range 2000 {
		if found := listens.FindStringSubmatch(text(p.stdout) + text(p.stderr)); found != nil {
			p.address = found[1]
			return p
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("it does not listen: %s", text(p.stderr))
	return nil
}

// client is a connection to a server.
type client struct {
	net.Conn
	*bufio.Reader
}

func (p *process) dial(t *testing.T) client {
	conn, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return client{conn, bufio.NewReader(conn)}
}

// head is the header of a request, which waits until the server has read it.
var head = fmt.Sprintf("POST /dialstatus/action/ HTTP/1.1\r\nHost: h\r\nContent-Type: "+urlencoded+
	"\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n", len(endedDial))

// send sends the header or the body of a request, and checks the answer.
func (c client) send(t *testing.T, part, want string) {
	t.Helper()
	io.WriteString(c.Conn, part)
	answer, err := http.ReadResponse(c.Reader, nil)
	if err != nil {
		t.Error(err)
		return
	}
	body, _ := io.ReadAll(answer.Body)
	if got := fmt.Sprint(answer.StatusCode, " ", answer.Close, " ", string(body)); got != want {
		t.Errorf("answer: %s, want %s", got, want)
	}
}

const ( // what send wants: the status, whether the connection closes, the body
	goOn   = "100 false "
	stays  = "200 false " + hangsUp
	closes = "200 true " + hangsUp
)

func TestServer(t *testing.T) {
	warn := func(text string) string { return logged(slog.LevelWarn, text) }
	example := warn("DIAL_TO is not set, or is the example: nobody will answer")
	open := warn("PLIVO_AUTH_TOKEN is not set: anyone is answered, with PHLO_BASIC_AUTH or without")
	for name, test := range map[string]struct{ variables, warnings []string }{
		"as it is":    {nil, []string{example, open}},
		"the example": {[]string{"DIAL_TO=+12025550123", "PLIVO_AUTH_TOKEN=x"}, []string{example}},
		"only PHLO's": {[]string{"DIAL_TO=+12025550143", "PHLO_BASIC_AUTH=a:b"}, []string{open}},
		"production": {[]string{"DIAL_TO=+12025550123,+12025550143", "PLIVO_AUTH_TOKEN=x",
			"PUBLIC_URL=https://h", "MARTINI_ENV=production"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			server := start(t, nil, test.variables...)
			listens := logged(slog.LevelInfo, "listening", "address", server.address)
			if answer, err := http.Get("http://" + server.address); err != nil || answer.StatusCode != 200 {
				t.Errorf("answer: %v, %v", answer, err)
			}
			want := append([]string{listens}, test.warnings...)
			if got := lines(text(server.stdout)); !slices.Equal(got, want) {
				t.Errorf("log: %q, want %q", got, want)
			}
		})
	}
}

// The process ends with a status, and says why on stderr.
func TestServerDoesNotStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	help := "dialstatus takes no arguments. These variables configure it:\n"
	for _, v := range variables[:len(variables)-1] {
		help += fmt.Sprintf("\n%s (default %q)\n    %s\n", v.name, v.byDefault, v.want)
	}
	help += "\nMARTINI_ENV (default \"development\")\n    development, test or production\n"
	for _, test := range []struct {
		argument, variable string
		status             int
		stderr             string
	}{
		{"-h", "", 0, help},
		{"PLIVO_AUTH_TOKEN=s3cret", "", 2, help},
		{"-s3cret", "", 2, help},
		{"---s3cret", "", 2, help},
		{"", "PORT=http", 1, "PORT \"http\": want a port number\n"},
		{"", "PORT=" + port, 1, "HOST and PORT: listen tcp 127.0.0.1:" + port +
			": bind: address already in use\n"},
		{"", "PORT=65536", 1, "HOST and PORT: listen tcp: address 65536: invalid port\n"},
	} {
		p := launch(t, nil, test.argument, test.variable)
		<-p.ended
		got := fmt.Sprint(p.ProcessState.ExitCode(), text(p.stdout), text(p.stderr))
		if want := fmt.Sprint(test.status, "", test.stderr); got != want {
			t.Errorf("%s%s: got %s, want %s", test.argument, test.variable, got, want)
		}
	}
}

// A panic ends its connection, not the server, and its stack is one record.
func TestPanic(t *testing.T) {
	log := newFile(t)
	server := httptest.NewUnstartedServer(nil)
	app := newApp(config{}, slog.New(slog.NewJSONHandler(log, nil)))
	server.Config = newServer(app)
	app.log = nil // so that a report panics
	server.Start()
	defer server.Close()
	for range 2 {
		if _, err := http.Post(server.URL+"/dialstatus", urlencoded, nil); !errors.Is(err, io.EOF) {
			t.Errorf("answered, or not by the server: %v", err)
		}
	}
	if got := lines(text(log)); len(got) != 2 || !strings.Contains(got[1], ".report(") ||
		!strings.HasPrefix(got[1], `{"level":"ERROR","msg":"http: panic serving`) {
		t.Errorf("log: %q", got)
	}
}

// A report is never lost, and no caller with it, whatever becomes of stdout.
func TestStdoutFails(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("this system has none that is always full: ", err)
	}
	reader, writer, _ := os.Pipe()
	reader.Close()
	for cause, stdout := range map[string]*os.File{"no space left": full, "broken pipe": writer} {
		server := start(t, stdout) // its first record is on stderr
		client := server.dial(t)
		client.send(t, head, goOn)
		client.send(t, endedDial, stays)
		if log := text(server.stderr); strings.Count(log, cause) < 2 || !strings.Contains(log, `"dial"`) {
			t.Errorf("%s: stderr: %s", cause, log)
		}
	}
}

// Who drips a request is cut off, and told so where it is the body.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	server := start(t, nil)
	drip := func(sent string) (after time.Duration, answer string) {
		client, began := server.dial(t), time.Now()
		io.WriteString(client.Conn, sent)
		time.AfterFunc(4*time.Second, func() { io.WriteString(client.Conn, "a") })
		bytes, _ := io.ReadAll(client.Reader)
		return time.Since(began).Round(time.Second), string(bytes)
	}
	header := make(chan time.Duration)
	go func() {
		after, _ := drip(head[:50])
		header <- after
	}()
	after, answer := drip(head)
	if header := <-header; header != 5*time.Second || after != 10*time.Second {
		t.Errorf("a header is cut off after %v, a body after %v", header, after)
	}
	if !strings.HasPrefix(answer, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 400 Bad Request\r\n") {
		t.Errorf("answer: %q", answer)
	}
}

// What is open at a signal is answered, though it comes after the listener has
// closed, or its body comes later still. What never comes is not waited for.
func TestStop(t *testing.T) {
	t.Parallel()
	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			server := start(t, nil)
			never, slow, idle := server.dial(t), server.dial(t), server.dial(t)
			never.send(t, head, goOn)
			slow.send(t, head, goOn)
			idle.send(t, head, goOn)
			idle.send(t, endedDial, stays)
			signalled := time.Now()
			server.Process.Signal(signal)
			time.Sleep(500 * time.Millisecond)
			idle.send(t, head, goOn)
			idle.send(t, endedDial, closes)
			late := server.dial(t)
			for err := error(nil); err == nil; time.Sleep(10 * time.Millisecond) {
				_, err = net.Dial("tcp", server.address) // until it is closed
			}
			if closed := time.Since(signalled); closed < time.Second {
				t.Errorf("it listened for only %v", closed)
			}
			late.send(t, head, goOn)
			late.send(t, endedDial, closes)
			time.Sleep(1700 * time.Millisecond)
			slow.send(t, endedDial, closes)
			err, took := <-server.ended, time.Since(signalled)
			if err != nil || text(server.stderr) != "" || took > 4*time.Second {
				t.Errorf("after %v: %v, stderr: %s", took, err, text(server.stderr))
			}
			if n := strings.Count(text(server.stdout), `"msg":"dial"`); n != 4 {
				t.Errorf("%d of 4 reports: %s", n, text(server.stdout))
			}
		})
	}
}

// A second signal does not wait for a request that is under way.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			server, began := start(t, nil), time.Now()
			server.dial(t).send(t, head, goOn)
			var err error
			for ; err == nil; time.Sleep(50 * time.Millisecond) {
				err = server.Process.Signal(signal) // until there is none
			}
			if err := <-server.ended; err == nil || time.Since(began) >= time.Second {
				t.Errorf("waited for the request: %v", err)
			}
		})
	}
}

// guideApp is the app as Plivo's guide writes it.
func guideApp(logs io.Writer) http.Handler {
	m := martini.Classic()
	m.Logger(log.New(logs, "[martini] ", 0))
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

// Each route, in the guide's app, in this app, and in this app with a signature
// to check. x-guide is the time in proportion to the guide's.
func Benchmark(b *testing.B) {
	discard := struct{ io.Writer }{io.Discard} // for io.Discard itself, log formats nothing
	open := newTestApp(b, "PUBLIC_URL="+publicURL).app
	closed := newTestApp(b, "PUBLIC_URL="+publicURL, "PLIVO_AUTH_TOKEN="+testToken).app
	open.log = slog.New(slog.NewJSONHandler(discard, nil))
	closed.log = open.log
	for _, route := range []struct{ name, path, form string }{
		{"answer", "/dialstatus/", ringingCall},
		{"action", "/dialstatus/action", endedDial},
	} {
		var guide float64
		for i, app := range []http.Handler{guideApp(discard), open, closed} {
			name := []string{"guide", "dialstatus", "dialstatus-signed"}[i]
			b.Run(route.name+"/"+name, func(b *testing.B) {
				request, writer := signed(route.path, route.form), new(httptest.ResponseRecorder)
				b.ReportAllocs()
				for b.Loop() {
					r := *request
					r.Form, r.PostForm, r.Body = nil, nil, io.NopCloser(strings.NewReader(route.form))
					app.ServeHTTP(writer, &r) // the writer keeps no body
				}
				perOp := float64(b.Elapsed()) / float64(b.N)
				if i == 0 {
					guide = perOp
				}
				b.ReportMetric(perOp/guide, "x-guide")
			})
		}
	}
}
