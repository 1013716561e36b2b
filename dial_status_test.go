package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/go-martini/martini"
	plivoxml "github.com/plivo/plivo-go/v7/xml"
)

// Requests as Plivo sends them, modelled on captured traffic.
var (
	ringingCall = form(
		"BillRate=0.005",
		"CallStatus=ringing",
		"CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"CountryCode=US",
		"Direction=inbound",
		"Event=StartApp",
		"From=12025550123",
		"ParentAuthID=MAXXXXXXXXXXXXXXXXXX",
		"RouteType=Domestic_Anchored",
		"STIRAttestation=Not+Applicable",
		"STIRVerification=Not+Applicable",
		"SessionStart=2024-10-25+14%3A13%3A37.779297",
		"To=12025550199",
	)
	answeredLeg = form(
		"BillRate=0.005",
		"CallStatus=in-progress",
		"CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"DialALegUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"DialAction=answer",
		"DialBLegBillRate=0.01",
		"DialBLegFrom=12025550123",
		"DialBLegPosition=2",
		"DialBLegStatus=answer",
		"DialBLegTo=12025550143",
		"DialBLegUUID=c0a58e17-9d24-4f6b-8a13-72e5b4c9d806",
		"Direction=inbound",
		"Event=DialAnswer",
		"From=12025550123",
		"To=12025550199",
	)
	endedLeg = form(
		"BillRate=0.005",
		"CallStatus=in-progress",
		"CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"DialALegUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"DialAction=hangup",
		"DialBLegBillDuration=60",
		"DialBLegBillRate=0.01",
		"DialBLegDuration=11",
		"DialBLegFrom=12025550123",
		"DialBLegHangupCause=NORMAL_CLEARING",
		"DialBLegHangupCauseCode=4000",
		"DialBLegHangupCauseName=Normal+Hangup",
		"DialBLegHangupSource=Callee",
		"DialBLegPosition=2",
		"DialBLegStatus=hangup",
		"DialBLegTo=12025550143",
		"DialBLegUUID=c0a58e17-9d24-4f6b-8a13-72e5b4c9d806",
		"Direction=inbound",
		"Event=DialHangup",
		"From=12025550123",
		"To=12025550199",
	)
	completedDial = form(
		"BillRate=0.005",
		"CallStatus=in-progress",
		"CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"DialALegUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"DialBLegUUID=c0a58e17-9d24-4f6b-8a13-72e5b4c9d806",
		"DialHangupCause=NORMAL_CLEARING",
		"DialRingStatus=true",
		"DialStatus=completed",
		"Direction=inbound",
		"Event=Redirect",
		"From=12025550123",
		"To=12025550199",
	)
	unansweredDial = form(
		"BillRate=0.005",
		"CallStatus=in-progress",
		"CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"DialALegUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"DialBLegUUID=",
		"DialHangupCause=NO_ANSWER",
		"DialRingStatus=true",
		"DialStatus=no-answer",
		"Direction=inbound",
		"Event=Redirect",
		"From=12025550123",
		"To=12025550199",
	)
	endedCall = form(
		"AnswerTime=2024-10-25+14%3A13%3A41",
		"BillDuration=60",
		"BillRate=0.005",
		"CallStatus=completed",
		"CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9",
		"Direction=inbound",
		"Duration=14",
		"EndTime=2024-10-25+14%3A13%3A55",
		"Event=Hangup",
		"From=12025550123",
		"HangupCause=NORMAL_CLEARING",
		"HangupCauseCode=4000",
		"HangupCauseName=Normal+Hangup",
		"HangupSource=Caller",
		"ParentAuthID=MAXXXXXXXXXXXXXXXXXX",
		"SessionStart=2024-10-25+14%3A13%3A37.779297",
		"StartTime=2024-10-25+14%3A13%3A37",
		"To=12025550199",
	)
)

// keys are those of each record, in their order.
var keys = map[string][]string{
	"call": {"CallUUID", "From", "To", "Direction", "CallStatus"},
	"leg": {"DialAction", "DialALegUUID", "DialBLegUUID", "DialBLegTo", "DialBLegStatus",
		"DialBLegDuration", "DialBLegHangupCause", "DialBLegHangupSource", "CallUUID"},
	"dial": {"DialStatus", "DialALegUUID", "DialBLegUUID", "DialRingStatus", "DialHangupCause",
		"CallUUID", "From", "To"},
	"hangup": {"CallUUID", "From", "To", "Direction", "CallStatus", "HangupCause", "Duration"},
}

const (
	empty     = `<Response></Response>`
	hangsUp   = `<Response><Hangup></Hangup></Response>`
	dialStart = `<Response><Dial action="http://example.com/dialstatus/action/" method="POST" `
	dialEnd   = `callbackUrl="http://example.com/dialstatus/" callbackMethod="POST" redirect="true">`
	dials     = dialStart + dialEnd + `<Number>+12025550123</Number></Dial></Response>`
)

// says is the document that says a sentence and hangs up.
func says(sentence string) string {
	return `<Response><Speak>` + sentence + `</Speak><Hangup></Hangup></Response>`
}

// form is the body of a form post with these encoded fields.
func form(fields ...string) string { return strings.Join(fields, "&") }

// record is the line that the log has of a form, without its time.
func record(level, message, form string) string {
	values, err := url.ParseQuery(form)
	if err != nil {
		panic(err)
	}
	line := `{"level":"` + level + `","msg":"` + message + `"`
	for _, key := range keys[message] {
		value, err := json.Marshal(values.Get(key))
		if err != nil {
			panic(err)
		}
		line += `,"` + key + `":` + string(value)
	}
	return line + "}"
}

// environment looks up the variables of a list of NAME=value.
func environment(variables ...string) func(string) string {
	return func(name string) string {
		for _, variable := range variables {
			if value, ok := strings.CutPrefix(variable, name+"="); ok {
				return value
			}
		}
		return ""
	}
}

// testApp is the whole app with what it has logged.
type testApp struct {
	*app
	log bytes.Buffer
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
// returns what the app logged of it.
func (test *testApp) send(r *http.Request) (answer *httptest.ResponseRecorder, records []string) {
	test.log.Reset()
	test.rejected.Store(0)
	answer = httptest.NewRecorder()
	test.ServeHTTP(afterTheLog{answer, &test.log}, r)
	return answer, recordsOf(test.log.String())
}

// afterTheLog spoils an answer that comes before its record.
type afterTheLog struct {
	*httptest.ResponseRecorder
	log *bytes.Buffer
}

func (w afterTheLog) WriteHeader(status int) {
	if w.log.Len() == 0 {
		status = http.StatusTeapot
	}
	w.ResponseRecorder.WriteHeader(status)
}

var timeKey = regexp.MustCompile(`"time":"[^"]*",`)

// recordsOf splits a log into its records, without their time.
func recordsOf(log string) []string {
	log = timeKey.ReplaceAllString(strings.TrimSuffix(log, "\n"), "")
	if log == "" {
		return nil
	}
	return strings.Split(log, "\n")
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
	if form != "" && r.Header["Content-Type"] == nil {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	return r
}

// multipartForm is a form-data body of a form's fields, as PHLO's HTTP Request
// node can send it, and the header with its content type.
func multipartForm(t testing.TB, form string) (body, contentType string) {
	t.Helper()
	var buffer strings.Builder
	writer := multipart.NewWriter(&buffer)
	for field := range strings.SplitSeq(form, "&") {
		name, value, _ := strings.Cut(field, "=")
		if err := writer.WriteField(name, value); err != nil {
			t.Fatal(err)
		}
	}
	writer.Close()
	return buffer.String(), "Content-Type: " + writer.FormDataContentType()
}

// wantXML checks for 200, the content type, the document byte for byte, and one
// record.
func wantXML(t *testing.T, app *testApp, r *http.Request, document, record string) {
	t.Helper()
	answer, records := app.send(r)
	if answer.Code != http.StatusOK {
		t.Errorf("status %d, want 200", answer.Code)
	}
	if contentType := answer.Header().Get("Content-Type"); contentType != "application/xml" {
		t.Errorf("Content-Type %q, want application/xml", contentType)
	}
	if answer.Body.String() != document {
		t.Errorf("document:\n got %s\nwant %s", answer.Body, document)
	}
	if len(records) != 1 || records[0] != record {
		t.Errorf("log:\n got %s\nwant %s", strings.Join(records, "\n     "), record)
	}
}

// rejection is the record of a request that was not served.
type rejection struct {
	Level, Msg, Reason, Path, URL, Peer string
	ForwardedFor                        string `json:"X-Forwarded-For"`
	Status, Omitted                     int
}

// wantRejection checks for the status, one plain line with the text, and one
// record of both and of where the request came from.
func wantRejection(t *testing.T, app *testApp, r *http.Request, status int, text string) rejection {
	t.Helper()
	answer, records := app.send(r)
	line := strings.TrimSuffix(answer.Body.String(), "\n")
	if answer.Code != status {
		t.Errorf("status %d, want %d", answer.Code, status)
	}
	if !strings.HasPrefix(answer.Header().Get("Content-Type"), "text/plain") ||
		!strings.Contains(line, text) || strings.ContainsAny(line, "\n<") {
		t.Errorf("answer: %s %q, want a plain line with %q", answer.Header(), line, text)
	}
	if len(records) != 1 {
		t.Fatalf("log: %q, want one record", records)
	}
	var got rejection
	if err := json.Unmarshal([]byte(records[0]), &got); err != nil {
		t.Fatal(err)
	}
	want := got
	want.Level, want.Msg, want.Status, want.Reason = "WARN", "rejected", status, line
	want.Path, want.Peer, want.Omitted = r.URL.Path, r.RemoteAddr, 0
	want.ForwardedFor = strings.Join(r.Header["X-Forwarded-For"], ", ")
	if got != want {
		t.Errorf("log:\n got %+v\nwant %+v", got, want)
	}
	return got
}

func TestAnswerURL(t *testing.T) {
	app := newTestApp(t)
	const apiCall = "CallStatus=in-progress&Direction=outbound&CallUUID=1&From=2&To=3"
	for _, test := range []struct{ name, form, document, record string }{
		{"a call reaches the number", ringingCall, dials, "call"},
		{"an API call is answered", apiCall, dials, "call"},
		{"nothing is sent", "", dials, "call"},
		{"an unknown CallStatus", "CallStatus=Completed", dials, "call"},
		{"a called leg answers", answeredLeg, empty, "leg"},
		{"a called leg has ended", endedLeg, empty, "leg"},
		{"an event whose call is over", "DialAction=hangup&CallStatus=completed", empty, "leg"},
		{"an event of a hangup", "DialAction=hangup&Event=Hangup", empty, "leg"},
		{"an unknown event", "DialAction=digits&CallStatus=ringing", empty, "leg"},
		{"the call is over", endedCall, empty, "hangup"},
		{"the call is over, whatever its status", "Event=Hangup&CallStatus=ringing", empty, "hangup"},
		{"the call is over, and no event", "DialAction=&Event=Hangup", empty, "hangup"},
		{"final: completed", "CallStatus=completed", empty, "hangup"},
		{"final: busy", "CallStatus=busy", empty, "hangup"},
		{"final: failed", "CallStatus=failed", empty, "hangup"},
		{"final: timeout", "CallStatus=timeout", empty, "hangup"},
		{"final: no-answer", "CallStatus=no-answer", empty, "hangup"},
		{"final: cancel", "CallStatus=cancel", empty, "hangup"},
		{"final, whatever the event", "CallStatus=cancel&Event=StartApp", empty, "hangup"},
	} {
		for _, path := range []string{"/dialstatus/", "/dialstatus"} {
			t.Run(test.name+", "+path, func(t *testing.T) {
				wantXML(t, app, post(path, test.form), test.document, record("INFO", test.record, test.form))
			})
		}
	}
}

func TestActionURL(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ status, level, document string }{
		{"completed", "INFO", hangsUp},
		{"cancel", "INFO", hangsUp},
		{"busy", "INFO", says("The line is busy. Please try again later.")},
		{"no-answer", "INFO", says("Nobody answered. Please try again later.")},
		{"timeout", "INFO", says("The call could not be connected in time. Please try again later.")},
		{"failed", "INFO", says("The call could not be connected.")},
		{"Completed", "WARN", says("The call has ended.")},
		{"a+new+one", "WARN", says("The call has ended.")},
	} {
		form := strings.Replace(completedDial, "DialStatus=completed", "DialStatus="+test.status, 1)
		for _, path := range []string{"/dialstatus/action", "/dialstatus/action/"} {
			t.Run(test.status+", "+path, func(t *testing.T) {
				wantXML(t, app, post(path, form), test.document, record(test.level, "dial", form))
			})
		}
	}
	for _, form := range []string{"", "DialStatus=", "DialALegUUID=1&CallStatus=completed"} {
		t.Run("no DialStatus: "+form, func(t *testing.T) {
			wantRejection(t, app, post("/dialstatus/action", form), 400, "DialStatus")
		})
	}
}

// A report is the same however its fields are sent.
func TestFields(t *testing.T) {
	app := newTestApp(t)
	const path, urlencoded = "/dialstatus/action/", "Content-Type: application/x-www-form-urlencoded"
	body, contentType := multipartForm(t, completedDial)
	query := "?" + form("DialStatus=busy", completedDial)
	for _, test := range []struct {
		name string
		sent *http.Request
	}{
		{"urlencoded", post(path, completedDial)},
		{"urlencoded, in capitals", post(path, completedDial, strings.ToUpper(urlencoded))},
		{"urlencoded, with a charset", post(path, completedDial, urlencoded+"; charset=utf-8")},
		{"urlencoded, with spaces", post(path, completedDial, urlencoded+" ; charset=utf-8")},
		{"urlencoded, with an odd parameter", post(path, completedDial, urlencoded+"; charset")},
		{"multipart", post(path, body, contentType)},
		{"query", post(path+"?"+completedDial, "")},
		{"query, and JSON without a body", post(path+"?"+completedDial, "", "Content-Type: application/json")},
		{"query and body: the body counts", post(path+query, completedDial)},
		{"query and multipart: the body counts", post(path+query, body, contentType)},
		{"a semicolon in the query of multipart", post(path+"?a=b;c", body, contentType)},
		{"part in the query, part in the body", post(path+query, "DialStatus=completed")},
		{"several values: the first counts", post(path, form(completedDial, "DialStatus=busy"))},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantXML(t, app, test.sent, hangsUp, record("INFO", "dial", completedDial))
		})
	}
	for name, form := range map[string]string{
		"nobody answers":       unansweredDial,
		"control characters":   "DialStatus=no-answer&DialALegUUID=%22%5C%0A%0D%00%E2%80%A8&From=%ff%C3%BC",
		"another record in it": "DialStatus=no-answer&DialBLegUUID=%22,%22DialStatus%22:%22busy",
		"XML in it":            "DialStatus=no-answer&DialALegUUID=%3C%2FResponse%3E",
	} {
		t.Run(name, func(t *testing.T) {
			record := record("INFO", "dial", form)
			record = strings.NewReplacer(`\u003c`, `<`, `\u003e`, `>`).Replace(record)
			wantXML(t, app, post(path, form), says("Nobody answered. Please try again later."), record)
		})
	}
	t.Run("a semicolon is a character like others", func(t *testing.T) {
		const uri = "sip:ann@example.com;transport=tls"
		want := record("INFO", "call", "From="+url.QueryEscape(uri)+"&To="+url.QueryEscape(uri))
		wantXML(t, app, post("/dialstatus/?To="+uri, "From="+uri), dials, want)
	})
}

func TestDialDocument(t *testing.T) {
	const head = dialStart + dialEnd
	for _, test := range []struct{ variables, document string }{
		{"DIAL_TO=12025550101", head + "<Number>12025550101</Number>"},
		{"DIAL_TO=+1202555", head + "<Number>+1202555</Number>"},
		{"DIAL_TO=+120255501234567", head + "<Number>+120255501234567</Number>"},
		{"DIAL_TO=+12025550101, sip:a.b@phone.plivo.com ,+12025550102", head +
			"<Number>+12025550101</Number><User>sip:a.b@phone.plivo.com</User><Number>+12025550102</Number>"},
		{"DIAL_TO=sip:o'neil@example.com;transport=tcp?a=1&b=2", head +
			"<User>sip:o&#39;neil@example.com;transport=tcp?a=1&amp;b=2</User>"},
		{"DIAL_TIMEOUT=1", dialStart + `timeout="1" ` + dialEnd + "<Number>+12025550123</Number>"},
		{"CALLER_ID=12025550150", strings.Replace(head, `callbackUrl`, `callerId="12025550150" callbackUrl`, 1) +
			"<Number>+12025550123</Number>"},
	} {
		t.Run(test.variables, func(t *testing.T) {
			wantXML(t, newTestApp(t, test.variables), post("/dialstatus/", ""),
				test.document+"</Dial></Response>", record("INFO", "call", ""))
		})
	}
}

// The URLs in the Dial document begin with the one by which Plivo reached the
// server.
func TestBase(t *testing.T) {
	const (
		public  = "PUBLIC_URL=https://calls.example.org/plivo/"
		https   = "X-Forwarded-Proto: https"
		tunnel  = "X-Forwarded-Host: abc.ngrok.app"
		example = "http://example.com"
	)
	for _, test := range []struct {
		name, publicURL string
		headers         []string
		base            string
	}{
		{"curl", "", []string{"Host: localhost:8080"}, "http://localhost:8080"},
		{"curl, IPv6", "", []string{"Host: [::1]:8080"}, "http://[::1]:8080"},
		{"ngrok", "", []string{"Host: abc.ngrok.app", https, tunnel}, "https://abc.ngrok.app"},
		{"ngrok --host-header=rewrite", "", []string{"Host: localhost:8080", https, tunnel},
			"https://abc.ngrok.app"},
		{"two proxies: the first entry is the client's side", "", []string{"X-Forwarded-Proto: https , http",
			"X-Forwarded-Host: calls.example.org:8443 , inner:80"}, "https://calls.example.org:8443"},
		{"only the scheme is forwarded", "", []string{https}, "https://example.com"},
		{"only the host is forwarded", "", []string{tunnel}, "http://abc.ngrok.app"},
		{"an empty host is forwarded", "", []string{"X-Forwarded-Host: "}, example},
		{"the scheme in capitals", "", []string{"X-Forwarded-Proto: HTTPS"}, "https://example.com"},
		{"another scheme does not count", "", []string{"X-Forwarded-Proto: javascript"}, example},
		{"https and its port", "", []string{https, tunnel + ":443"}, "https://abc.ngrok.app"},
		{"https and its port in Host", "", []string{https, "Host: example.com:443"}, "https://example.com"},
		{"http and its port", "", []string{tunnel + ":80"}, "http://abc.ngrok.app"},
		{"https and the port of http", "", []string{https, tunnel + ":80"}, "https://abc.ngrok.app:80"},
		{"http and the port of https", "", []string{tunnel + ":443"}, "http://abc.ngrok.app:443"},
		{"a port that ends alike", "", []string{tunnel + ":8080"}, "http://abc.ngrok.app:8080"},
		{"the highest port", "", []string{tunnel + ":65535"}, "http://abc.ngrok.app:65535"},
		{"PUBLIC_URL", public, nil, "https://calls.example.org/plivo"},
		{"PUBLIC_URL before what a stranger says", public, []string{"Host: evil.example", tunnel + "/"},
			"https://calls.example.org/plivo"},
		{"PUBLIC_URL with a port", "PUBLIC_URL=http://10.0.0.1:8080", nil, "http://10.0.0.1:8080"},
		{"PUBLIC_URL with an escape", "PUBLIC_URL=http://h/a%20b", nil, "http://h/a%20b"},
		{"PUBLIC_URL with several slashes", "PUBLIC_URL=http://h///", nil, "http://h"},
		{"PUBLIC_URL of a host named like the route", "PUBLIC_URL=http://dialstatus", nil, "http://dialstatus"},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantXML(t, newTestApp(t, test.publicURL), post("/dialstatus/", "", test.headers...),
				strings.ReplaceAll(dials, example, test.base), record("INFO", "call", ""))
		})
	}
}

var badHosts = []string{`a"b`, "a b", "a<b>", "user@host", "host/path", "host?query", "host#fragment", "host:port",
	"host:", "host:65536", "[::1", "[:::]", "%zz", "h\x00st", "bücher.example", ":80"}

// Only what needs the URL of this server is refused where there is none.
func TestBadHost(t *testing.T) {
	app := newTestApp(t)
	closed := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin)
	for _, host := range badHosts {
		for _, header := range []string{"Host: " + host, "X-Forwarded-Host: " + host} {
			t.Run(header, func(t *testing.T) {
				wantRejection(t, app, post("/dialstatus/", ringingCall, header), 400, "X-Forwarded-Host")
				wantRejection(t, closed, signed("/dialstatus/action/", completedDial, header), 400, "X-Forwarded-Host")
				dial, hangup := record("INFO", "dial", completedDial), record("INFO", "hangup", endedCall)
				wantXML(t, app, post("/dialstatus/action/", completedDial, header), hangsUp, dial)
				wantXML(t, app, post("/dialstatus/", endedCall, header), empty, hangup)
				wantXML(t, app, post("/dialstatus/", endedLeg, header), empty, record("INFO", "leg", endedLeg))
				wantXML(t, closed, withLogin("phlo", "pass:word", header), hangsUp, dial)
			})
		}
	}
	t.Run("no Host", func(t *testing.T) {
		wantRejection(t, app, post("/dialstatus/", ringingCall, "Host: "), 400, "X-Forwarded-Host")
	})
}

func TestRejections(t *testing.T) {
	app := newTestApp(t)
	const running, curl = "dialstatus runs", "curl -d CallStatus=ringing http://example.com/dialstatus/"
	for _, test := range []struct {
		method, target string
		status         int
		text           string
	}{
		{"GET", "/dialstatus/", 405, running},
		{"GET", "/dialstatus/", 405, curl},
		{"HEAD", "/dialstatus", 405, "send POST"},
		{"PUT", "/dialstatus/action", 405, "send POST"},
		{"DELETE", "/dialstatus/action/", 405, "send POST"},
		{"post", "/dialstatus/action/", 405, "send POST"},
		{"POST", "/", 404, "send to /dialstatus/ or /dialstatus/action/"},
		{"POST", "/dialstatus//", 404, "/dialstatus/"},
		{"POST", "/dialstatus/action/x", 404, "/dialstatus/"},
		{"POST", "/x/dialstatus/", 404, "/dialstatus/"},
		{"GET", "/dial_status.go", 404, "/dialstatus/"},
	} {
		t.Run(test.method+" "+test.target, func(t *testing.T) {
			r := httptest.NewRequest(test.method, test.target, nil)
			got := wantRejection(t, app, r, test.status, test.text)
			if got.URL != "http://example.com"+test.target {
				t.Errorf("url %q", got.URL)
			}
			answer, _ := app.send(r)
			if allow := answer.Header().Get("Allow"); (allow == "POST") != (test.status == 405) {
				t.Errorf("Allow: %q", allow)
			}
		})
	}
	t.Run("a third route is named, too", func(t *testing.T) {
		app := newTestApp(t)
		app.routes.Post("/third", func() {})
		wantRejection(t, app, post("/", ""), 404, "/dialstatus/action/ or /third/")
	})
	t.Run("behind proxies", func(t *testing.T) {
		r := post("/", "", "X-Forwarded-For: 192.0.2.1, 192.0.2.2", "X-Forwarded-For: 192.0.2.3")
		if got := wantRejection(t, app, r, 404, ""); got.Peer != "192.0.2.1:1234" ||
			got.ForwardedFor != "192.0.2.1, 192.0.2.2, 192.0.2.3" {
			t.Errorf("%+v", got)
		}
	})
}

func TestBadInput(t *testing.T) {
	app := newTestApp(t)
	const (
		urlencoded = "application/x-www-form-urlencoded"
		multipart  = "multipart/form-data; boundary=a"
		field      = "--a\r\nContent-Disposition: form-data; name=DialStatus\r\n\r\n"
		file       = "--a\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n"
	)
	long := strings.Repeat("a", maxBody)
	for _, test := range []struct {
		name, contentType, body string
		status                  int
		text                    string
	}{
		{"too long", urlencoded, long + "a", 413, "65536 bytes"},
		{"too long, multipart", multipart, field + long + "\r\n--a--", 413, "65536 bytes"},
		{"too long, a file", multipart, file + long + "\r\n--a--", 413, "65536 bytes"},
		{"JSON", "application/json", `{"DialStatus":"busy"}`, 415, urlencoded},
		{"text", "text/plain", "DialStatus=busy", 415, urlencoded},
		{"an empty content type", "", "DialStatus=busy", 415, urlencoded},
		{"an invalid content type", ";=", "DialStatus=busy", 415, urlencoded},
		{"bad percent escape", urlencoded, "DialStatus=%zz", 400, `invalid URL escape "%zz"`},
		{"multipart without a boundary", "multipart/form-data", field + "busy\r\n--a--", 400, "boundary"},
		{"multipart with another boundary", "multipart/form-data; boundary=b", field + "busy\r\n--a--", 400, "multipart"},
		{"multipart that breaks off", multipart, field + "busy", 400, "unexpected EOF"},
	} {
		for _, path := range []string{"/dialstatus/", "/dialstatus/action/"} {
			for _, length := range []int64{int64(len(test.body)), -1} {
				t.Run(fmt.Sprint(test.name, ", ", path, ", length ", length), func(t *testing.T) {
					r := post(path, test.body, "Content-Type: "+test.contentType)
					r.ContentLength = length
					wantRejection(t, app, r, test.status, test.text)
				})
			}
		}
	}
	t.Run("bad percent escape in the query", func(t *testing.T) {
		wantRejection(t, app, post("/dialstatus/action/?a=%zz", completedDial), 400, `invalid URL escape "%zz"`)
	})
	t.Run("a body that breaks off", func(t *testing.T) {
		r := post("/dialstatus/action/", completedDial)
		r.Body = io.NopCloser(io.MultiReader(r.Body, iotest.ErrReader(io.ErrUnexpectedEOF)))
		wantRejection(t, app, r, 400, "broke off")
	})
	t.Run("a body without an end is not read to it", func(t *testing.T) {
		read := 0
		r := post("/dialstatus/", "", "Content-Type: "+urlencoded)
		r.Body = io.NopCloser(readFunc(func(p []byte) (int, error) {
			if read += len(p); read > 2*maxBody {
				return 0, io.EOF // or it fills the memory of this machine
			}
			return copy(p, strings.Repeat("a", len(p))), nil
		}))
		wantRejection(t, app, r, 413, "65536 bytes")
		if read > maxBody+1 {
			t.Errorf("read %d bytes", read)
		}
	})
}

// readFunc is a reader that is a function.
type readFunc func([]byte) (int, error)

func (read readFunc) Read(p []byte) (int, error) { return read(p) }

func TestBodiesAtTheLimit(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	app := newTestApp(t)
	const field = "--a\r\nContent-Disposition: form-data; name=DialStatus\r\n\r\ncompleted\r\n"
	const file = "--a\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n"
	for _, test := range []struct{ name, contentType, body, filler, end string }{
		{"urlencoded", "application/x-www-form-urlencoded", "DialStatus=completed&a=", "a", ""},
		{"a file", "multipart/form-data; boundary=a", field + file, "a", "\r\n--a--"},
	} {
		t.Run(test.name, func(t *testing.T) {
			body := test.body + strings.Repeat("a", maxBody-len(test.body)-len(test.end)) + test.end
			r := post("/dialstatus/action/", body, "Content-Type: "+test.contentType)
			wantXML(t, app, r, hangsUp, record("INFO", "dial", "DialStatus=completed"))
			if files, _ := os.ReadDir(os.TempDir()); len(files) > 0 {
				t.Errorf("temporary files: %v", files)
			}
		})
	}
}

// Docker splits a line of the log at 16 KiB, and half a record is no JSON.
func TestRecordsAreShort(t *testing.T) {
	app := newTestApp(t)
	closed := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken)
	const controls = "\x01" // six bytes in JSON
	for _, test := range []struct {
		name, path, field, message string
	}{
		{"a call", "/dialstatus/", "CallStatus", "call"},
		{"a leg", "/dialstatus/", "DialAction", "leg"},
		{"a dial", "/dialstatus/action/", "DialStatus", "dial"},
		{"a hangup", "/dialstatus/", "Event", "hangup"},
	} {
		t.Run(test.name, func(t *testing.T) {
			values := url.Values{"Event": {"Hangup"}}
			if test.message != "hangup" {
				values.Del("Event")
			}
			for _, key := range keys[test.message] {
				values.Set(key, strings.Repeat(controls, 2000))
			}
			_, records := app.send(post(test.path, values.Encode()))
			if len(records) != 1 || !strings.Contains(records[0], `"msg":"`+test.message+`"`) {
				t.Fatalf("log: %.200q", records)
			}
			if n := len(records[0]); n > 16<<10 || n < 4<<10 {
				t.Errorf("a record of %d bytes", n)
			}
			if n := strings.Count(records[0], "... (2000 bytes)"); n != len(keys[test.message]) {
				t.Errorf("%d values are marked: %.1000s", n, records[0])
			}
		})
	}
	for name, r := range map[string]*http.Request{
		"path":            post("/"+strings.Repeat("%01", 9000), ""),
		"query":           post("/dialstatus/?"+strings.Repeat("%01", 9000), "", "Host: a b"),
		"method":          httptest.NewRequest(strings.Repeat("M", 20000), "/dialstatus/", nil),
		"X-Forwarded-For": post("/", "", "X-Forwarded-For: "+strings.Repeat(controls, 20000)),
		"multipart error": post("/dialstatus/", "--a\r\n"+strings.Repeat("b", 20000)+"\r\n\r\n\r\n--a--",
			"Content-Type: multipart/form-data; boundary=a"),
	} {
		t.Run(name, func(t *testing.T) {
			for _, app := range []*testApp{app, closed} {
				answer, records := app.send(r.Clone(t.Context()))
				if answer.Code < 400 || answer.Code > 499 {
					t.Errorf("status %d", answer.Code)
				}
				if n := len(strings.Join(records, "\n")); n > 16<<10 || n == 0 {
					t.Errorf("a log of %d bytes", n)
				}
			}
		})
	}
	t.Run("what Plivo sends is not cut", func(t *testing.T) {
		longest := "From=sip:" + strings.Repeat("a", maxValue-4)
		wantXML(t, app, post("/dialstatus/", longest), dials, record("INFO", "call", longest))
	})
	t.Run("not inside a character", func(t *testing.T) {
		_, records := app.send(post("/dialstatus/", "From="+strings.Repeat("é", 200)))
		if want := `"From":"` + strings.Repeat("é", 128) + `... (400 bytes)"`; !strings.Contains(records[0], want) {
			t.Errorf("log: %s", records[0])
		}
		_, records = app.send(post("/dialstatus/", "From=a"+strings.Repeat("é", 200)))
		if want := `"From":"a` + strings.Repeat("é", 127) + `... (401 bytes)"`; !strings.Contains(records[0], want) {
			t.Errorf("log: %s", records[0])
		}
	})
}

// A flood of requests that are not served leaves 20 records in a second; it
// does not touch reports.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		app := newTestApp(t)
		flood := func(requests int) (rejections []rejection, reports int) {
			app.log.Reset()
			for range requests {
				answer := httptest.NewRecorder()
				if app.ServeHTTP(answer, post("/", "")); answer.Code != 404 {
					t.Fatal(answer.Code)
				}
				app.ServeHTTP(answer, post("/dialstatus/action/", completedDial))
			}
			for _, line := range recordsOf(app.log.String()) {
				var got rejection
				if err := json.Unmarshal([]byte(line), &got); err != nil {
					t.Fatal(err)
				}
				if got.Msg == "dial" {
					reports++
				} else {
					rejections = append(rejections, got)
				}
			}
			return rejections, reports
		}
		for second, omitted := range []int{0, 80, 80, 0} {
			requests := 100
			if second == 2 {
				requests = 20 // as many as are recorded
			}
			rejections, reports := flood(requests)
			if len(rejections) != 20 || reports != requests {
				t.Errorf("second %d: %d rejections, %d reports", second, len(rejections), reports)
			}
			for i, got := range rejections {
				if (i == 0 && got.Omitted != omitted) || (i > 0 && got.Omitted != 0) {
					t.Errorf("second %d: record %d says that %d are omitted", second, i, got.Omitted)
				}
			}
			time.Sleep(time.Second)
		}
	})
}

func TestPanicIsContained(t *testing.T) {
	app := newTestApp(t)
	r := post("/dialstatus/", ringingCall)
	r.Body = io.NopCloser(readFunc(func([]byte) (int, error) { panic("s3cret\ninternals") }))
	answer, records := app.send(r)
	if answer.Code != 500 || answer.Body.String() != "internal server error\n" {
		t.Errorf("answer: %d %q", answer.Code, answer.Body)
	}
	if len(records) != 1 || !strings.Contains(records[0], `"level":"ERROR","msg":"panic","cause":"s3cret\ninternals"`) ||
		!strings.Contains(records[0], "readFunc.Read") {
		t.Errorf("log: %s", records)
	}
}

func TestRecordOfPanicIsShort(t *testing.T) {
	app := newTestApp(t)
	app.routes.NotFound(func() { panic(strings.Repeat("\x01", 20000)) })
	answer, records := app.send(post("/"+strings.Repeat("%01", 9000), ""))
	if n := len(strings.Join(records, "\n")); answer.Code != 500 || n > 16<<10 || n == 0 {
		t.Errorf("%d, a log of %d bytes", answer.Code, n)
	}
}

func TestDocumentIsNeverTheTextOfAnError(t *testing.T) {
	defer func() {
		if cause := recover(); !strings.Contains(fmt.Sprint(cause), "unsupported type") {
			t.Errorf("panic: %v", cause)
		}
	}()
	document(make(chan int))
}

const (
	testToken = "YzBmZmVlYzBmZmVlYzBmZmVl"
	testLogin = "phlo:pass:word"
	testNonce = "05429567804466091622"
	publicURL = "https://calls.example.org"

	v3      = "X-Plivo-Signature-V3"
	maV3    = "X-Plivo-Signature-Ma-V3"
	v3Nonce = "X-Plivo-Signature-V3-Nonce"
)

// sign is Plivo's V3 signature of a POST, written from its description: the
// URL, "?" and the query sorted by name and value, "." and the form sorted the
// same with nothing between, "." and the nonce; HMAC-SHA256 with the auth
// token, base64. As the published vectors show, the "?" stands before the form,
// too, where there is no query, and the first "." only between query and form.
func sign(authToken, called, form, nonce string) string {
	sorted := func(encoded, equals, ampersand string) (text string, some bool) {
		values, err := url.ParseQuery(strings.ReplaceAll(encoded, ";", "%3B"))
		if err != nil {
			panic(err)
		}
		var pairs []string
		for _, name := range slices.Sorted(maps.Keys(values)) {
			for _, value := range slices.Sorted(slices.Values(values[name])) {
				pairs = append(pairs, name+equals+value)
			}
		}
		return strings.Join(pairs, ampersand), len(pairs) > 0
	}
	text, encodedQuery, _ := strings.Cut(called, "?")
	query, hasQuery := sorted(encodedQuery, "=", "&")
	params, hasParams := sorted(form, "", "")
	if hasQuery || hasParams {
		text += "?" + query
	}
	if hasQuery && hasParams {
		text += "."
	}
	return keyedHash(authToken, text+params+"."+nonce)
}

// keyedHash is the HMAC-SHA256 of a text, in base64.
func keyedHash(authToken, text string) string {
	mac := hmac.New(sha256.New, []byte(authToken))
	mac.Write([]byte(text))
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// signed makes a form post that Plivo signed for publicURL.
func signed(target, form string, headers ...string) *http.Request {
	return post(target, form, append(headers,
		v3+": "+sign(testToken, publicURL+target, form, testNonce),
		v3Nonce+": "+testNonce)...)
}

// withLogin makes a form post as PHLO's HTTP Request node does with Basic Auth.
func withLogin(user, password string, headers ...string) *http.Request {
	r := post("/dialstatus/action/", completedDial, headers...)
	r.SetBasicAuth(user, password)
	return r
}

// manyFields is n more fields of a form.
func manyFields(n int) string {
	var form strings.Builder
	for i := range n {
		fmt.Fprintf(&form, "&field%d=", i)
	}
	return form.String()
}

// The vectors of plivo-go's utils_test.go, TestValidateSignatureV3Pass1 and Pass3.
func TestPublishedSignatures(t *testing.T) {
	const (
		authToken = "Y2Q2ZDgxZmY5YWRiOTI5YmQ1Njg0MTAxZWIyOTc4"
		nonce     = "31627761595286130198"
		host      = "https://plivobin.non-prod.plivops.com"
		path      = "/api/v1/validate_signature03.xml"
	)
	form := url.Values{
		"ALegRequestUUID": {"3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"},
		"ALegUUID":        {"3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"},
		"BillRate":        {"0.002"},
		"CallStatus":      {"in-progress"},
		"CallUUID":        {"3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"},
		"Direction":       {"outbound"},
		"Event":           {"StartApp"},
		"From":            {"19792014278"},
		"ParentAuthID":    {"MANWVLYTK4ZWU1YTY4QA"},
		"RequestUUID":     {"3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"},
		"SIP-H-To":        {"<sip:PlivoSignature382029104058171078704104@52.9.11.55;transport=udp>;tag=1"},
		"SessionStart":    {"2020-04-08 11:34:33.238707"},
		"To":              {"sip:PlivoSignature382029104058171078704104@phone-qa.voice.plivodev.com"},
	}.Encode()
	app := newTestApp(t, "PLIVO_AUTH_TOKEN="+authToken)
	for target, signature := range map[string]string{
		path + "/?a=b&c=d": "k7Pusd4OxCIjR5IfA9iedDNu/h/gbdYqdzG/MiYtd1c=",
		path:               "iAjE5QqI37mbkYe4w3jTMudqEzbDufdqi7sYwTu64e0=",
	} {
		if got := sign(authToken, host+target, form, nonce); got != signature {
			t.Errorf("%s: the tests sign %s, Plivo %s", target, got, signature)
		}
		r := post(target, form, v3+": "+signature, v3Nonce+": "+nonce)
		if err := readForm(r); err != nil {
			t.Fatal(err)
		}
		if !app.isSigned(r, host) {
			t.Errorf("%s: not accepted", target)
		}
		if app.isSigned(r, host+"x") {
			t.Errorf("%s: accepted for another URL", target)
		}
	}
}

func TestPlivoMaySend(t *testing.T) {
	configured := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin, "PUBLIC_URL="+publicURL)
	tunnelled := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken)
	escaped := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PUBLIC_URL="+publicURL+"/a%20b")

	const action, query = "/dialstatus/action/", "/dialstatus/action/?a=b"
	signature := sign(testToken, publicURL+action, completedDial, testNonce)
	// withSignature makes a post of completedDial with these headers.
	withSignature := func(headers ...string) *http.Request {
		return post(action, completedDial, append(headers, v3Nonce+": "+testNonce)...)
	}
	const other = "c2lnbmVk" // a signature with another token
	body, contentType := multipartForm(t, "DialStatus=completed&a=b+c")
	for _, test := range []struct {
		name string
		app  *testApp
		sent *http.Request
	}{
		{"answer URL", configured, signed("/dialstatus/", ringingCall)},
		{"answer URL without its slash", configured, signed("/dialstatus", ringingCall)},
		{"event of a leg", configured, signed("/dialstatus/", endedLeg)},
		{"end of a call", configured, signed("/dialstatus/", endedCall)},
		{"action URL", configured, signed(action, completedDial)},
		{"a query", configured, signed("/dialstatus/action/?z=1&a=b%20c", completedDial)},
		{"a query value that ends in a dot", configured, signed(query+".", completedDial)},
		{"a query value that ends in an ampersand", configured, signed(query+"%26", completedDial)},
		{"a repeated name in the query", configured, signed(query+"&a=&a=a", completedDial)},
		{"a repeated field", configured, signed(action, completedDial+"&To=2&To=1&To=&To=3")},
		{"repeated fields that differ from query to form", configured, signed(query+"&To=2", completedDial+"&a=1")},
		{"a name that begins another", configured, signed(query+"&a-b=1&a1=2", completedDial+"&From-b=1&From1=2")},
		{"a last field that ends in a dot", configured, signed(action, completedDial+".")},
		{"a query, and a last field that ends in a dot", configured, signed(query, completedDial+".")},
		{"empty values", configured, signed(query+"&c=&d", completedDial+"&c=&d")},
		{"not ASCII", configured, signed(query+"&N=J%C3%BCrgen", completedDial+"&N=%E7%8E%8B")},
		{"a semicolon", configured, signed(query+"&to=sip:ann@example.com;transport=tls", completedDial+"&Via=a;b=c")},
		{"no form, only a query", configured, signed("/dialstatus/action/?DialStatus=busy", "")},
		{"neither form nor query", configured, signed("/dialstatus/", "")},
		{"an empty query", configured, signed("/dialstatus/action/?", completedDial)},
		{"600 fields", configured, signed(action, completedDial+manyFields(600))},
		{"600 fields in the query", configured, signed(query+manyFields(600), completedDial)},
		{"an escape in the path", configured, signed("/dialstatus%2Faction/", completedDial)},
		{"an escape in PUBLIC_URL", escaped, withSignature(v3 + ": " +
			sign(testToken, publicURL+"/a%20b"+action, completedDial, testNonce))},
		{"multipart", configured, post(action, body, contentType, v3Nonce+": "+testNonce,
			v3+": "+sign(testToken, publicURL+action, "DialStatus=completed&a=b%2Bc", testNonce))},
		{"the main account's signature", configured, withSignature(maV3 + ": " + signature)},
		{"one of several tokens", configured, withSignature(v3 + ": " + other + "," + signature + "," + other)},
		{"the first of several tokens", configured, withSignature(v3 + ": " + signature + "," + other)},
		{"one of several tokens, with spaces", configured, withSignature(v3 + ": " + other + " , " + signature + " ,")},
		{"the second of two header lines", configured, withSignature(v3+": "+other, v3+": "+signature)},
		{"the other header is for another token", configured, withSignature(v3+": "+other, maV3+": "+signature)},
		{"PHLO's login", configured, withLogin("phlo", "pass:word")},
		{"PHLO's login and a wrong signature", configured, withLogin("phlo", "pass:word", v3+": "+other)},
		{"ngrok", tunnelled, signed("/dialstatus/", ringingCall, "Host: localhost:8080",
			"X-Forwarded-Proto: https", "X-Forwarded-Host: calls.example.org")},
		{"a proxy that names the port", tunnelled, signed("/dialstatus/", ringingCall,
			"X-Forwarded-Proto: HTTPS", "X-Forwarded-Host: calls.example.org:443")},
		{"without a token anybody", newTestApp(t), withSignature()},
		{"without a token, login or not", newTestApp(t, "PHLO_BASIC_AUTH="+testLogin), withSignature()},
		{"without a token, whatever the signature", newTestApp(t), withSignature(v3 + ": " + other)},
	} {
		t.Run(test.name, func(t *testing.T) {
			answer, records := test.app.send(test.sent)
			if answer.Code != 200 || !strings.HasPrefix(answer.Body.String(), "<Response>") || len(records) != 1 {
				t.Errorf("%d %s\nlog: %s", answer.Code, answer.Body, records)
			}
		})
	}
}

// A signature does not change which of several values counts.
func TestSignedValuesKeepTheirOrder(t *testing.T) {
	app := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PUBLIC_URL="+publicURL)
	r := signed("/dialstatus/action/", form(completedDial, "DialStatus=busy"))
	wantXML(t, app, r, hangsUp, record("INFO", "dial", completedDial))
}

// A change makes a forgery of a request.
type change func(r *http.Request)

func withHeader(name, value string) change {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

func withoutHeader(names ...string) change {
	return func(r *http.Request) {
		for _, name := range names {
			r.Header.Del(name)
		}
	}
}

func withForm(form string) change {
	return func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader(form)) }
}

func withTarget(target string) change {
	return func(r *http.Request) { r.URL, _ = url.ParseRequestURI(target) }
}

func TestForgeries(t *testing.T) {
	app := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin, "PUBLIC_URL="+publicURL)
	tunnelled := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken)
	const action, query = "/dialstatus/action/", "/dialstatus/action/?a=b"
	replace := func(old, new string) string { return strings.Replace(completedDial, old, new, 1) }
	signature := sign(testToken, publicURL+action, completedDial, testNonce)
	signedWith := func(authToken, nonce string) string {
		return sign(authToken, publicURL+action, completedDial, nonce)
	}
	v2 := keyedHash(testToken, publicURL+action+testNonce)
	login := func(user, password string) change {
		return func(r *http.Request) {
			r.Header.Del(v3)
			r.SetBasicAuth(user, password)
		}
	}
	for _, test := range []struct {
		name, target, form string // of a good request
		change             change
	}{
		{"changed field", action, completedDial, withForm(replace("=completed", "=busy"))},
		{"added field", action, completedDial, withForm(completedDial + "&X=")},
		{"added second value", action, completedDial, withForm(completedDial + "&DialStatus=busy")},
		{"dropped field", action, completedDial, withForm(replace("&DialStatus=completed", ""))},
		{"dropped form", action, completedDial, withForm("")},
		{"changed query", query, completedDial, withTarget(action + "?a=c")},
		{"added query", action, completedDial, withTarget(query)},
		{"dropped query", query, completedDial, withTarget(action)},
		{"added second value in the query", query, completedDial, withTarget(query + "&a=c")},
		{"added dots behind a query", query, completedDial, withForm(completedDial + "..")},
		{"added dots in the query", query, "", withTarget(query + "%2E")},
		{"added ampersands in the query", query, completedDial, withTarget(query + "%26%26")},
		{"added fragment", query, completedDial, withTarget(query + "#&HangupCause=x")},
		{"added fragment without a query", action, completedDial, withTarget(action + "?#&HangupCause=x")},
		{"fragment that is signed", query + "#c", completedDial, func(*http.Request) {}},
		{"other path", action, completedDial, withTarget("/dialstatus/")},
		{"other slash", action, completedDial, withTarget("/dialstatus/action")},
		{"other escape of the path", action, completedDial, withTarget("/dialstatus%2Faction/")},
		{"other nonce", action, completedDial, withHeader(v3Nonce, "05429567804466091623")},
		{"part of the form in the nonce", action, completedDial + "&Zip=1.2", func(r *http.Request) {
			withForm(completedDial + "&Zip=1")(r)
			r.Header.Set(v3Nonce, "2."+testNonce)
		}},
		{"all of the form but its begin in the nonce", action, completedDial, func(r *http.Request) {
			withForm("BillRate=0")(r) // the first of the form, up to its dot
			rest := strings.NewReplacer("BillRate=0.", "", "=", "", "&", "").Replace(completedDial)
			r.Header.Set(v3Nonce, rest+"."+testNonce)
		}},
		{"empty nonce", action, completedDial, func(r *http.Request) {
			r.Header.Set(v3Nonce, "")
			r.Header.Set(v3, signedWith(testToken, ""))
		}},
		{"no nonce", action, completedDial, func(r *http.Request) {
			r.Header.Del(v3Nonce)
			r.Header.Set(v3, signedWith(testToken, ""))
		}},
		{"other token", action, completedDial, withHeader(v3, signedWith("other", testNonce))},
		{"empty token", action, completedDial, withHeader(v3, signedWith("", testNonce))},
		{"other signature", action, completedDial, withHeader(v3, "c2lnbmVk")},
		{"part of the signature", action, completedDial, withHeader(v3, signature[:43])},
		{"more than the signature", action, completedDial, withHeader(v3, signature+"=")},
		{"empty signature", action, completedDial, withHeader(v3, "")},
		{"empty signatures", action, completedDial, withHeader(v3, ",, ,")},
		{"no headers", action, completedDial, withoutHeader(v3, v3Nonce)},
		{"no headers, answer URL", "/dialstatus/", ringingCall, withoutHeader(v3, v3Nonce)},
		{"no headers, event of a leg", "/dialstatus/", endedLeg, withoutHeader(v3, v3Nonce)},
		{"changed event of a leg", "/dialstatus/", endedLeg, withForm(answeredLeg)},
		{"V2 only", action, completedDial, func(r *http.Request) {
			withoutHeader(v3, v3Nonce)(r)
			r.Header.Set("X-Plivo-Signature-V2", v2)
			r.Header.Set("X-Plivo-Signature-Ma-V2", v2)
			r.Header.Set("X-Plivo-Signature-V2-Nonce", testNonce)
		}},
		{"V2's signature as V3's", action, completedDial, withHeader(v3, v2)},
		{"other password", action, completedDial, login("phlo", "pass:wor")},
		{"longer password", action, completedDial, login("phlo", "pass:words")},
		{"other user", action, completedDial, login("plho", "pass:word")},
		{"empty login", action, completedDial, login("", "")},
		{"another way to log in", action, completedDial, func(r *http.Request) {
			r.Header.Del(v3)
			r.Header.Set("Authorization", "Bearer "+testLogin)
		}},
		{"a login that does not decode", action, completedDial, func(r *http.Request) {
			r.Header.Del(v3)
			r.Header.Set("Authorization", "Basic "+testLogin)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := signed(test.target, test.form)
			test.change(r)
			wantForbidden(t, app, r)
		})
	}
	for name, headers := range map[string][]string{
		"other host":           {"X-Forwarded-Proto: https", "Host: evil.example"},
		"other forwarded host": {"X-Forwarded-Proto: https", "Host: calls.example.org", "X-Forwarded-Host: evil.example"},
		"other scheme":         {"X-Forwarded-Proto: http", "Host: calls.example.org"},
		"other port":           {"X-Forwarded-Proto: https", "Host: calls.example.org:8443"},
	} {
		t.Run(name, func(t *testing.T) { wantForbidden(t, tunnelled, signed(action, completedDial, headers...)) })
	}
	t.Run("login where none is set", func(t *testing.T) {
		wantForbidden(t, tunnelled, withLogin("phlo", "pass:word"))
		wantForbidden(t, tunnelled, withLogin("", ""))
	})
	t.Run("the URL that was checked is in the log", func(t *testing.T) {
		got := wantRejection(t, tunnelled, post("/dialstatus/action?a=b", completedDial, "Host: localhost:8080"), 403, "")
		if want := "http://localhost:8080/dialstatus/action?a=b"; got.URL != want {
			t.Errorf("url %q, want %q", got.URL, want)
		}
	})
}

// wantForbidden checks for 403, advice on how to mend it, and no secret in the
// log.
func wantForbidden(t *testing.T, app *testApp, r *http.Request) {
	t.Helper()
	got := wantRejection(t, app, r, 403, "forbidden")
	if !strings.Contains(got.Reason, "PUBLIC_URL") || !strings.Contains(got.Reason, "PLIVO_AUTH_TOKEN") {
		t.Errorf("no advice: %s", got.Reason)
	}
	log := app.log.String()
	for _, secret := range []string{testToken, "pass:wor", r.Header.Get(v3), r.Header.Get("Authorization")} {
		if len(secret) > 5 && strings.Contains(log, secret) {
			t.Errorf("%s in the log: %s", secret, log)
		}
	}
}

func TestWhereToListen(t *testing.T) {
	for address, variables := range map[string][]string{
		":8080":             nil,
		"[::1]:80":          {"HOST=::1", "PORT=80"},
		"[::]:80":           {"HOST=::", "PORT=80"},
		"[fe80::1%eth-0]:1": {"HOST=fe80::1%eth-0", "PORT=1"},
		"a_name.test-1:0":   {"HOST=a_name.test-1", "PORT=0"},
		"0.0.0.0:65535":     {"HOST=0.0.0.0", "PORT=65535"},
	} {
		if cfg, err := configure(environment(variables...)); cfg.address != address || err != nil {
			t.Errorf("%q: %q, %v", variables, cfg.address, err)
		}
	}
}

func TestConfigurationErrors(t *testing.T) {
	const (
		dialTo = "E.164 numbers, country code first (+12025550123), and SIP URIs " +
			"(sip:user@example.com), separated by commas"
		callerID = "an E.164 number of your account (+12025550123)"
		seconds  = "whole seconds to let it ring, at least 1"
		public   = "the URL by which Plivo reaches this server: http or https, a host, " +
			"perhaps a path, and nothing else; take /dialstatus/ off its end"
		host      = "a name or an address to listen on"
		port      = "a port number to listen on, 0 to 65535"
		authToken = "the auth token as the console shows it"
		login     = "user:password"
		env       = "development, test or production"
		unquoted  = "it without the quotes around it"
	)
	type bad struct {
		variable, want string
		values         []string
	}
	for _, test := range []bad{
		{"DIAL_TO", dialTo, []string{"2025", "+120255", "+02025550123", "+1202555012345678", "+1 202 555 0123",
			"12025550123,", ",12025550123", "12025550123,<x>,me", "sip:example.com", "tel:+12025550123", " "}},
		{"CALLER_ID", callerID, []string{"Alice", "12025550123,12025550124", "sip:ann"}},
		{"DIAL_TIMEOUT", seconds, []string{"0", "-1", "1.5", "30s", "99999999999999999999"}},
		{"PUBLIC_URL", public, []string{"example.com", "ftp://example.com", "https://", "https://example.com:65536",
			"https://example.com/?", "https://example.com/?a=b", "https://example.com/#", "https://exa mple.com",
			`http://h/a"<b>`, "http://h/%zz", "http://[:::]", "https://h/dialstatus", "https://h/dialstatus/",
			"https://h/a/dialstatus//", "https://h/dialstatus/action", "https://h/dialstatus/action/"}},
		{"HOST", host, []string{"a b", "\n", "[::1]", "127.0.0.1:80", "http://localhost"}},
		{"PORT", port, []string{"http", "65536", "-1", "99999", " 80"}},
		{"MARTINI_ENV", env, []string{"Production", "prod", "production ", " production"}},
		{"DIAL_TO", unquoted, []string{`"+12025550101"`, `'+12025550101'`}},
		{"CALLER_ID", unquoted, []string{`"+12025550101"`}},
		{"DIAL_TIMEOUT", unquoted, []string{`'30'`}},
		{"PUBLIC_URL", unquoted, []string{`"https://example.com"`, `""`}},
		{"HOST", unquoted, []string{`"localhost"`}},
		{"PORT", unquoted, []string{`'8080'`}},
		{"MARTINI_ENV", unquoted, []string{`"production"`}},
	} {
		for _, value := range test.values {
			wantProblems(t, []string{test.variable + "=" + value},
				fmt.Sprintf("%s %q: want %s", test.variable, value, test.want))
		}
	}
	// These may hold a password.
	for _, test := range []bad{
		{"DIAL_TO", dialTo, []string{"sip:user:s3cret@host x", "user:s3cret@host", "sip:user:s3cret%40host",
			"sip:a@b</User><Number>1", "sip:a@b\nc"}},
		{"HOST", host, []string{"user:s3cret@host"}},
		{"CALLER_ID", callerID, []string{"sip:user:s3cret@host"}},
		{"PUBLIC_URL", public, []string{"https://user:s3cret@example.com", "https://s3cret@example.com",
			"https://user:s3cret%40example.com"}},
		{"PUBLIC_URL", unquoted, []string{`"https://user:s3cret@example.com"`}},
		{"PLIVO_AUTH_TOKEN", authToken, []string{"s3cret\n", "s3 cret"}},
		{"PLIVO_AUTH_TOKEN", unquoted, []string{`"s3cret"`, `'s3cret'`, "'s3\ncret'"}},
		{"PHLO_BASIC_AUTH", login, []string{"s3cret", ":s3cret", "s3cret:", "\ns3cret", "user:s3cret\r"}},
		{"PHLO_BASIC_AUTH", unquoted, []string{`"user:s3cret"`}},
	} {
		for _, value := range test.values {
			wantProblems(t, []string{test.variable + "=" + value},
				fmt.Sprintf("%s %q: want %s", test.variable, "(not shown)", test.want))
		}
	}
	const production = ` "": want a value when MARTINI_ENV is production`
	wantProblems(t, []string{"MARTINI_ENV=production"},
		"DIAL_TO"+production, "PUBLIC_URL"+production, "PLIVO_AUTH_TOKEN"+production)
	wantProblems(t, []string{"MARTINI_ENV=production", "DIAL_TO=12025550101", "PUBLIC_URL=https://example.com"},
		"PLIVO_AUTH_TOKEN"+production)
	wantProblems(t, []string{"PORT=a", "CALLER_ID=d"}, `CALLER_ID "d": want `+callerID, `PORT "a": want `+port)
	for _, variable := range []string{"MARTINI_ENV=", "MARTINI_ENV=development", "MARTINI_ENV=test",
		`PLIVO_AUTH_TOKEN="`, `PHLO_BASIC_AUTH="a:b'`, "PUBLIC_URL=https://dialstatus/x"} {
		if _, err := configure(environment(variable)); err != nil {
			t.Errorf("%s: %v", variable, err)
		}
	}
}

// wantProblems checks for the lines of an environment's error.
func wantProblems(t *testing.T, variables []string, problems ...string) {
	t.Helper()
	_, err := configure(environment(variables...))
	if want := strings.Join(problems, "\n"); err == nil || err.Error() != want {
		t.Errorf("%q: got:\n%v\nwant:\n%s", variables, err, want)
	}
}

// What each limit of the server is for stands in the README.
func TestServerLimits(t *testing.T) {
	app := newTestApp(t)
	server := newServer(t.Context(), app.app)
	for _, test := range []struct {
		name string
		got  time.Duration
		want time.Duration
	}{
		{"ReadHeaderTimeout", server.ReadHeaderTimeout, 5 * time.Second},
		{"ReadTimeout", server.ReadTimeout, 10 * time.Second},
		{"WriteTimeout, longer than ReadTimeout", server.WriteTimeout, 15 * time.Second},
		{"IdleTimeout, longer than a balancer's 600 s", server.IdleTimeout, 620 * time.Second},
		{"a stop, together less than 4 s", drainTime + lateTime + graceTime, 3 * time.Second},
	} {
		if test.got != test.want {
			t.Errorf("%s: %v, want %v", test.name, test.got, test.want)
		}
	}
	server.ErrorLog.Print("what net/http says")
	if want := `"level":"WARN","msg":"what net/http says"`; !strings.Contains(app.log.String(), want) {
		t.Errorf("log: %s", &app.log)
	}
}

// pipe takes what its failures let through, and keeps it.
type pipe struct {
	bytes.Buffer
	failures []failure // one for each Write, then none
}

// failure is an error of a Write that took the first n bytes.
type failure struct {
	n     int
	cause error
}

func (p *pipe) Write(record []byte) (int, error) {
	if len(p.failures) == 0 {
		return p.Buffer.Write(record)
	}
	failed := p.failures[0]
	p.failures = p.failures[1:]
	if failed.cause == nil {
		return p.Buffer.Write(record)
	}
	p.Buffer.Write(record[:failed.n])
	return failed.n, failed.cause
}

// A record that stdout does not take is on stderr, whole.
func TestSink(t *testing.T) {
	full, closed := errors.New("no space left"), errors.New("broken pipe")
	told := func(cause string) string {
		return `{"level":"ERROR","msg":"stdout failed: what it does not take is here","cause":"` + cause + `"}`
	}
	for _, test := range []struct {
		name           string
		failures       []failure
		stdout, stderr []string
	}{
		{"stdout works", nil, []string{"1", "2", "3", "4"}, nil},
		{"full, then not", []failure{{0, full}, {0, full}}, []string{"3", "4"}, []string{told("no space left"), "1", "2"}},
		{"full twice", []failure{{0, full}, {}, {0, full}}, []string{"2", "4"}, []string{told("no space left"), "1", "3"}},
		{"full, then closed", []failure{{0, full}, {0, closed}, {0, closed}, {0, full}}, nil,
			[]string{told("no space left"), "1", told("broken pipe"), "2", "3", "4"}},
		{"half a record", []failure{{9, full}}, []string{"half", "2", "3", "4"}, []string{told("no space left"), "1"}},
		{"half a record, then none", []failure{{9, full}, {0, full}}, []string{"half", "3", "4"},
			[]string{told("no space left"), "1", "2"}},
		{"two halves", []failure{{9, full}, {10, full}}, []string{"half", "half", "3", "4"},
			[]string{told("no space left"), "1", "2"}},
		{"half a record, then only the end of its line", []failure{{9, full}, {1, full}}, []string{"half", "3", "4"},
			[]string{told("no space left"), "1", "2"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			stdout, stderr := &pipe{failures: test.failures}, new(pipe)
			log := slog.New(slog.NewJSONHandler(&sink{stdout: stdout, stderr: stderr}, nil))
			for i := range 4 {
				log.Info(fmt.Sprint(i + 1))
			}
			lines := func(written *pipe) (short []string) {
				for _, line := range recordsOf(written.String()) {
					if short, ok := strings.CutPrefix(line, `{"level":"INFO","msg":"`); ok {
						line = strings.TrimSuffix(short, `"}`)
					}
					if line == `{"time":"` {
						line = "half"
					}
					short = append(short, line)
				}
				return short
			}
			if got := lines(stdout); !slices.Equal(got, test.stdout) {
				t.Errorf("stdout: %q, want %q", got, test.stdout)
			}
			if got := lines(stderr); !slices.Equal(got, test.stderr) {
				t.Errorf("stderr: %q, want %q", got, test.stderr)
			}
		})
	}
}

func FuzzAnswerURL(f *testing.F) { fuzz(f, "/dialstatus/", ringingCall, endedLeg, endedCall) }
func FuzzActionURL(f *testing.F) { fuzz(f, "/dialstatus/action/", completedDial, unansweredDial) }

// fuzz sends what strangers may send to a route. It is never answered with a
// 5xx; a 200 is a well-formed <Response>; there is one record, of one short
// line, for each request. Where a token is set, nothing unsigned gets a 200,
// and what is signed is never forbidden.
func fuzz(f *testing.F, path string, forms ...string) {
	body, contentType := multipartForm(f, forms[0])
	for _, seed := range []*http.Request{
		post(path, forms[0], "Host: localhost:8080"),
		post(path, forms[1], "Host: h", "X-Forwarded-Proto: https", "X-Forwarded-Host: abc.ngrok.app, h"),
		post(path, forms[len(forms)-1], "Authorization: Basic Og==", v3Nonce+": 1", v3+": c2lnbmVk, ,"),
		post(path+"?DialStatus=busy", body, contentType, "Host: [::1]:80", "X-Forwarded-Host: [::1"),
		post(path+"?CallStatus=busy&CallStatus=x", forms[0], "X-Forwarded-Proto: ftp, https", "Host: a<b"),
		post(path+"?#%", `{"DialStatus":"busy"}`, "Content-Type: application/json", "Host: %zz"),
		post(path+"??&&;", "DialStatus=%zz&From=</Response>", "Content-Type: multipart/form-data", "Host: h:99999"),
		post(path, "", "Host: ", "Authorization: Bearer x"),
		signed(path+"?a=b", forms[0], "Authorization: Basic !"),
	} {
		body, _ := io.ReadAll(seed.Body)
		header := seed.Header.Get
		f.Add(string(body), header("Content-Type"), seed.URL.RawQuery, seed.Host, header("X-Forwarded-Proto"),
			header("X-Forwarded-Host"), strings.TrimPrefix(header(v3), "s"), header(v3Nonce), header("Authorization"))
	}
	open := newTestApp(f)
	closed := newTestApp(f, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin)
	configured := newTestApp(f, "PLIVO_AUTH_TOKEN="+testToken, "PUBLIC_URL="+publicURL)
	f.Fuzz(func(t *testing.T, body, contentType, query, host, proto, forwardedHost, signature, nonce, login string) {
		target, err := url.ParseRequestURI(path + "?" + query)
		if err != nil {
			t.Skip("net/http refuses it")
		}
		send := func(app *testApp, r *http.Request) (status int) {
			answer, records := app.send(r)
			if answer.Code >= 500 || len(records) != 1 || !json.Valid([]byte(records[0])) || len(records[0]) > 16<<10 {
				t.Errorf("%d %s\nlog: %s", answer.Code, answer.Body, records)
			}
			if answer.Code == 200 {
				wantResponse(t, answer.Body)
			}
			return answer.Code
		}
		strange := func() *http.Request {
			r := post(path, body, "Content-Type: "+contentType, "Host: "+host, "X-Forwarded-Proto: "+proto,
				"X-Forwarded-Host: "+forwardedHost, v3+": "+signature, maV3+": "+signature, v3Nonce+": "+nonce,
				"Authorization: "+login)
			r.URL = target
			return r
		}
		send(open, strange())
		if send(closed, strange()) == 200 {
			t.Error("answered without a signature")
		}
		if _, err := parseQuery(body); err == nil && send(configured, signed(path, body)) == 403 {
			t.Error("forbidden though signed")
		}
	})
}

// wantResponse checks for a well-formed XML document of one <Response>.
func wantResponse(t *testing.T, document io.Reader) {
	decoder := xml.NewDecoder(document)
	var response struct {
		XMLName xml.Name `xml:"Response"`
	}
	if err := decoder.Decode(&response); err != nil {
		t.Error(err)
	}
	if _, err := decoder.Token(); err != io.EOF {
		t.Errorf("after the document: %v", err)
	}
}

// TestMain lets the test binary be the server itself, so that the tests have a
// process of it, or the guide's app, to be measured beside it, or a request for
// wrk, which measures them.
func TestMain(m *testing.M) {
	switch os.Getenv("TEST_SERVER") {
	case "dialstatus":
		main()
	case "guide":
		log.Fatal(http.ListenAndServe(os.Getenv("HOST")+":"+os.Getenv("PORT"), guideApp(os.Stdout)))
	case "wrk":
		r := signed("/dialstatus/", ringingCall)
		if os.Getenv("ROUTE") == "action" {
			r = signed("/dialstatus/action", completedDial)
		}
		body, _ := io.ReadAll(r.Body)
		fmt.Printf("wrk.method, wrk.body = 'POST', '%s'\n", body)
		for name := range r.Header {
			fmt.Printf("wrk.headers['%s'] = '%s'\n", name, r.Header.Get(name))
		}
	default:
		os.Exit(m.Run())
	}
}

// process is a server that runs, or has run.
type process struct {
	*exec.Cmd
	address        string
	stdout, stderr output
	ended          chan error
}

// output is what a process writes.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(text []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(text)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// launch starts the test binary as a server with these variables, on a free
// port unless they say otherwise. A test can set what it likes before.
func launch(t *testing.T, p *process, variables ...string) *process {
	t.Helper()
	executable, err := filepath.Abs(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	p.Cmd.Path, p.Dir = executable, t.TempDir()
	p.Env = append([]string{"TEST_SERVER=dialstatus", "HOST=127.0.0.1", "PORT=0", "GOCOVERDIR=" + p.Dir,
		"GORACE=atexit_sleep_ms=0"}, variables...)
	if p.Stdout == nil {
		p.Stdout = &p.stdout
	}
	p.Stderr = &p.stderr
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	p.ended = make(chan error, 1)
	go func() { p.ended <- p.Wait() }()
	t.Cleanup(func() { p.Process.Kill() })
	return p
}

var listening = regexp.MustCompile(`"msg":"listening","address":"([^"]*)"`)

// start launches a server and waits until it listens.
func start(t *testing.T, variables ...string) *process {
	t.Helper()
	return listens(t, launch(t, &process{Cmd: new(exec.Cmd)}, variables...))
}

// listens waits until the server's log, wherever it is, says where it listens.
func listens(t *testing.T, p *process) *process {
	t.Helper()
	p.address = addressIn(t, func() string { return p.stdout.String() + p.stderr.String() })
	return p
}

// addressIn waits until a log says where the server listens, and returns that.
func addressIn(t *testing.T, log func() string) string {
	t.Helper()
	for range 1000 {
		if found := listening.FindStringSubmatch(log()); found != nil {
			return found[1]
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("it does not listen: %s", log())
	return ""
}

// end waits until the process has ended, and returns its error.
func (p *process) end(t *testing.T) error {
	t.Helper()
	select {
	case err := <-p.ended:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
		return nil
	}
}

// stop sends a signal, and returns the log but for its first record when the
// process has ended, which must be with status 0.
func (p *process) stop(t *testing.T, signal os.Signal) (records []string) {
	t.Helper()
	p.Process.Signal(signal)
	if err := p.end(t); err != nil || p.stderr.String() != "" {
		t.Errorf("after %v: %v, stderr: %q", signal, err, &p.stderr)
	}
	records = recordsOf(p.stdout.String())
	if len(records) == 0 {
		t.Fatal("no log on stdout")
	}
	return records[1:]
}

// send posts the end of a dial with this CallUUID, and checks the answer.
func (p *process) send(t *testing.T, callUUID string) {
	t.Helper()
	answer, err := http.PostForm("http://"+p.address+"/dialstatus/action/",
		url.Values{"DialStatus": {"completed"}, "CallUUID": {callUUID}})
	if err != nil {
		t.Error(err)
		return
	}
	defer answer.Body.Close()
	if body, err := io.ReadAll(answer.Body); answer.StatusCode != 200 || err != nil || string(body) != hangsUp {
		t.Errorf("answer: %d %q %v", answer.StatusCode, body, err)
	}
}

// dial opens a connection to the server.
func (p *process) dial(t *testing.T) net.Conn {
	t.Helper()
	connection, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	return connection
}

// halfRequest is a request whose other half is missing, and that half.
func halfRequest() (half, otherHalf string) {
	request := fmt.Sprintf("POST /dialstatus/action/ HTTP/1.1\r\nHost: localhost\r\n"+
		"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n\r\n%s", len(completedDial), completedDial)
	return request[:len(request)-100], request[len(request)-100:]
}

func TestServer(t *testing.T) {
	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			server := start(t)
			os.Mkdir(filepath.Join(server.Dir, "public"), 0o755)
			os.WriteFile(filepath.Join(server.Dir, "public", "index.html"), []byte("a file"), 0o644)

			target := "http://" + server.address
			answer, err := http.Post(target+"/dialstatus/", "application/x-www-form-urlencoded", strings.NewReader(ringingCall))
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			body, _ := io.ReadAll(answer.Body)
			if want := strings.ReplaceAll(dials, "http://example.com", target); string(body) != want {
				t.Errorf("got %s, want %s", body, want)
			}
			if answer, err = http.Get(target + "/index.html"); err != nil || answer.StatusCode != 404 {
				t.Errorf("a file: %v, %v", answer, err)
			}
			signalled := time.Now()
			records := server.stop(t, signal)
			if took := time.Since(signalled); (took >= drainTime) != (signal == syscall.SIGTERM) {
				t.Errorf("an idle server ended after %v", took)
			}
			peer := regexp.MustCompile(`"peer":"127.0.0.1:[0-9]+"`)
			want := []string{
				`{"level":"WARN","msg":"DIAL_TO has a number that is reserved for fiction: nobody answers it"}`,
				`{"level":"WARN","msg":"PLIVO_AUTH_TOKEN is not set: anybody is answered, with PHLO_BASIC_AUTH or without"}`,
				record("INFO", "call", ringingCall),
				`{"level":"WARN","msg":"rejected","status":404,"reason":"not found: send to /dialstatus/ or /dialstatus/action/",` +
					`"path":"/index.html","url":"` + target + `/index.html","peer":"","X-Forwarded-For":"","omitted":0}`,
			}
			got := peer.ReplaceAllString(strings.Join(records, "\n"), `"peer":""`)
			if got != strings.Join(want, "\n") {
				t.Errorf("log:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
			}
			if _, err := net.Dial("tcp", server.address); err == nil {
				t.Error("something still listens")
			}
		})
	}
}

func TestFictionalNumbers(t *testing.T) {
	for dialTo, fictional := range map[string]bool{
		"+12025550100": true, "12025550199": true, "+13105550142": true, "sip:a@b, +12025550123": true,
		"+12025550123 ,+4930123456": true, "+12025550200": false, "+12025551234": false, "+12025560123": false,
		"+442025550123": false, "+120255501234": false, "sip:12025550123@example.com": false,
	} {
		if !isDialTo(dialTo) || isFictional(dialTo) != fictional {
			t.Errorf("%s: a destination: %v, fictional: %v", dialTo, isDialTo(dialTo), isFictional(dialTo))
		}
	}
}

func TestArguments(t *testing.T) {
	for argument, status := range map[string]int{"-h": 0, "--help": 0, "help": 2, "-x": 2, "": 2} {
		p := launch(t, &process{Cmd: &exec.Cmd{Args: []string{"dialstatus", argument}}}, "PORT=x")
		p.end(t)
		help, other := &p.stdout, &p.stderr
		if status != 0 {
			help, other = other, help
		}
		if p.ProcessState.ExitCode() != status || other.String() != "" {
			t.Errorf("%q: status %d, also says %q", argument, p.ProcessState.ExitCode(), other)
		}
		for _, v := range variables {
			if !strings.Contains(help.String(), "\n"+v.name+" ") || !strings.Contains(help.String(), v.want) {
				t.Errorf("%q: no %s in %s", argument, v.name, help)
			}
		}
		if lines := strings.Count(help.String(), "\n"); lines > 24 {
			t.Errorf("%q: %d lines", argument, lines)
		}
	}
}

// A report is never lost, and no caller with it, whatever becomes of stdout.
func TestStdoutFails(t *testing.T) {
	for _, test := range []struct {
		name, cause string
		stdout      func(t *testing.T) *os.File
	}{
		{"the disk is full", "no space left on device", func(t *testing.T) *os.File {
			stdout, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
			if err != nil {
				t.Skip("this system has none that is always full: ", err)
			}
			return stdout
		}},
		{"nobody reads", "broken pipe", func(t *testing.T) *os.File {
			reader, writer, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			reader.Close()
			return writer
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			stdout := test.stdout(t)
			defer stdout.Close()
			server := listens(t, launch(t, &process{Cmd: &exec.Cmd{Stdout: stdout}}))
			server.send(t, "call-1")
			server.send(t, "call-2")
			server.Process.Signal(os.Interrupt)
			if err := server.end(t); err != nil {
				t.Error(err)
			}
			log := server.stderr.String()
			if strings.Count(log, test.cause) != 1 || !strings.Contains(log, `"CallUUID":"call-1"`) ||
				!strings.Contains(log, `"CallUUID":"call-2"`) || strings.Count(log, "\n") != 6 {
				t.Errorf("stderr: %s", log)
			}
		})
	}
}

// A signal is followed by another while a request is under way.
func TestSecondSignalDoesNotWait(t *testing.T) {
	t.Parallel()
	server := start(t)
	half, _ := halfRequest()
	io.WriteString(server.dial(t), half)
	began := time.Now()
	for {
		server.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-server.ended:
			if err == nil || time.Since(began) >= drainTime {
				t.Errorf("waited for the request: %v", err)
			}
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func TestServerDoesNotStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	for _, test := range []struct {
		name      string
		variables []string
		lines     []string // the start of each
	}{
		{"every problem is told", []string{"DIAL_TO=me", "PORT=http"}, []string{`DIAL_TO "me": want`, `PORT "http": want`}},
		{"not quite production", []string{`MARTINI_ENV="production"`},
			[]string{`MARTINI_ENV "\"production\"": want it without the quotes`}},
		{"the port is taken", []string{"PORT=" + port},
			[]string{"HOST and PORT: listen tcp 127.0.0.1:" + port + ": bind: address already in use"}},
		{"the host is not here", []string{"HOST=192.0.2.1"}, []string{"HOST and PORT: listen tcp 192.0.2.1:0: bind:"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := launch(t, &process{Cmd: new(exec.Cmd)}, test.variables...)
			server.end(t)
			if status := server.ProcessState.ExitCode(); status != 1 {
				t.Errorf("exit status %d, want 1", status)
			}
			lines := strings.Split(strings.TrimSuffix(server.stderr.String(), "\n"), "\n")
			if len(lines) != len(test.lines) {
				t.Fatalf("stderr: %q", lines)
			}
			for i, line := range lines {
				if !strings.HasPrefix(line, test.lines[i]) {
					t.Errorf("stderr: %q, want %q", line, test.lines[i])
				}
			}
		})
	}
}

func TestHeaderLimit(t *testing.T) {
	server := start(t)
	for size, status := range map[int]int{31 << 10: 200, 33 << 10: 431, 100 << 10: 431} {
		r, _ := http.NewRequest(http.MethodPost, "http://"+server.address+"/dialstatus/", nil)
		r.Header.Set("X", strings.Repeat("a", size))
		if answer, err := http.DefaultClient.Do(r); err != nil || answer.StatusCode != status {
			t.Errorf("a header of %d bytes: %v, %v; want %d", size, answer, err, status)
		}
	}
}

// Many clients drip their requests, half of them the header and half the body.
// All are cut off, while good requests are answered and memory stays low; who
// drips a body is told.
func TestSlowClients(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 10 seconds")
	}
	t.Parallel()
	clients := 1500
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err == nil && limit.Cur < 2000 {
		clients = int(limit.Cur) - 500 // the other tests have files, too
		t.Logf("%d clients: there may be %d open files", clients, limit.Cur)
	}
	if clients < 100 {
		t.Skip("too few to be a test")
	}
	server := start(t)
	var cut sync.WaitGroup
	for i := range clients {
		cut.Go(func() {
			request, limit := "POST /dialstatus/ HTTP/1.1\r\nHost: localhost\r\n", 5*time.Second // for the header
			if i%2 == 1 {
				request += "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 60000\r\n\r\n"
				limit = 10 * time.Second // for all of it
			}
			connection, err := net.Dial("tcp", server.address)
			if err != nil {
				t.Error(err)
				return
			}
			defer connection.Close()
			io.WriteString(connection, request)
			began := time.Now()
			closed := make(chan string, 1)
			go func() {
				answer, _ := io.ReadAll(connection)
				closed <- string(answer)
			}()
			for {
				select {
				case answer := <-closed:
					if after := time.Since(began); after < limit-time.Second || after > limit+2500*time.Millisecond {
						t.Errorf("cut off after %v, not %v", after, limit)
					}
					if i%2 == 1 && !strings.HasPrefix(answer, "HTTP/1.1 400 ") {
						t.Errorf("a body that stalls is answered %.20q", answer)
					}
					return
				case <-time.After(time.Second):
					if time.Since(began) > limit+5*time.Second {
						t.Errorf("not cut off after %v", limit)
						return
					}
					io.WriteString(connection, "a")
				}
			}
		})
	}
	all := make(chan bool)
	go func() {
		cut.Wait()
		close(all)
	}()
	for left := true; left; {
		select {
		case <-all:
			left = false
		case <-time.After(100 * time.Millisecond):
			server.send(t, "among slow clients")
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", server.Process.Pid))
	if err != nil || raceDetector() {
		return // this system does not tell the peak of memory, or it is not that of the server
	}
	var peak int
	_, line, _ := strings.Cut(string(status), "VmHWM:")
	if fmt.Sscan(line, &peak); peak == 0 || peak > 80<<10 {
		t.Errorf("peak memory: %d KiB", peak)
	} else {
		t.Logf("peak memory: %d KiB", peak)
	}
}

// raceDetector reports whether it is in this build, which then takes several
// times the memory.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// A stop under load: every answered request is in the log, once, and every
// request that is sent on an open connection is answered. One that waits to be
// accepted is not open: the system resets it when the listener closes.
func TestStopUnderLoad(t *testing.T) {
	t.Parallel()
	server := start(t)
	var mu sync.Mutex
	var answered, closing []string // CallUUIDs; closing: with Connection: close
	stopping := make(chan bool)
	var clients sync.WaitGroup
	for client := range 16 {
		clients.Go(func() {
			for n := 0; ; {
				connection, err := net.Dial("tcp", server.address)
				if err != nil {
					select {
					case <-stopping:
					default:
						t.Error("before the stop: ", err)
					}
					return
				}
				reader := bufio.NewReader(connection)
				for open, first := true, true; open; first = false {
					n++
					callUUID := fmt.Sprintf("call-%d-%d", client, n)
					r := post("/dialstatus/action/", "DialStatus=completed&CallUUID="+callUUID)
					var answer *http.Response
					err := r.Write(connection)
					if err == nil {
						answer, err = http.ReadResponse(reader, r)
					}
					if err != nil {
						if !first || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
							t.Errorf("%s is not answered: %v", callUUID, err)
						}
						break
					}
					body, err := io.ReadAll(answer.Body)
					if answer.StatusCode != 200 || err != nil || string(body) != hangsUp {
						t.Errorf("%s is answered %d %q %v", callUUID, answer.StatusCode, body, err)
					}
					mu.Lock()
					answered = append(answered, callUUID)
					if answer.Close {
						closing = append(closing, callUUID)
					}
					mu.Unlock()
					open = !answer.Close
					if n%100 == client {
						time.Sleep(10 * time.Millisecond) // an open connection that is idle
					}
				}
				connection.Close()
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
	mu.Lock()
	if len(closing) > 0 {
		t.Error("an answer closes its connection before the stop")
	}
	mu.Unlock()
	close(stopping)
	records := server.stop(t, syscall.SIGTERM)
	clients.Wait()

	reported := make(map[string]int)
	for _, record := range records {
		var dial struct{ CallUUID string }
		if err := json.Unmarshal([]byte(record), &dial); err != nil {
			t.Errorf("%v: %s", err, record)
		}
		reported[dial.CallUUID]++
	}
	for _, callUUID := range answered {
		if n := reported[callUUID]; n != 1 {
			t.Errorf("%s is %d times in the log", callUUID, n)
		}
	}
	if len(answered) < 100 || len(closing) < 20 {
		t.Errorf("only %d requests were answered, %d of them in the stop", len(answered), len(closing))
	}
}

// What is under way at a signal is answered: a request that is sent by half,
// though its other half comes long after the listener is closed, and one that
// comes soon after it on a connection that was opened before.
func TestStopWaitsForRequests(t *testing.T) {
	t.Parallel()
	server := start(t)
	half, otherHalf := halfRequest()
	slow, slower, silent := server.dial(t), server.dial(t), server.dial(t)
	io.WriteString(slow, half)
	io.WriteString(slower, half)
	server.send(t, "before the stop")

	server.Process.Signal(syscall.SIGTERM)
	wantAnswer := func(connection net.Conn, request string, close bool) {
		t.Helper()
		io.WriteString(connection, request)
		answer, err := http.ReadResponse(bufio.NewReader(connection), nil)
		if err != nil {
			t.Error(err)
			return
		}
		if body, _ := io.ReadAll(answer.Body); string(body) != hangsUp || answer.Close != close {
			t.Errorf("answer: %q, close: %v", body, answer.Close)
		}
	}
	time.Sleep(500 * time.Millisecond)
	wantAnswer(server.dial(t), half+otherHalf, true) // the server still listens
	wantAnswer(slow, otherHalf, false)               // its header was read before the signal
	late := server.dial(t)
	time.Sleep(700 * time.Millisecond)
	if _, err := net.Dial("tcp", server.address); err == nil {
		t.Error("it still listens")
	}
	wantAnswer(silent, half+otherHalf, true)
	wantAnswer(late, half+otherHalf, true)
	time.Sleep(1500 * time.Millisecond)
	wantAnswer(slower, otherHalf, true)
	if err := server.end(t); err != nil || server.stderr.String() != "" {
		t.Errorf("%v, stderr: %s", err, &server.stderr)
	}
}

// Whatever strangers hold open, a stop takes no more than 4 s.
func TestStopIsShort(t *testing.T) {
	t.Parallel()
	server := start(t)
	half, _ := halfRequest()
	server.dial(t)
	io.WriteString(server.dial(t), half)
	io.WriteString(server.dial(t), half[:20])
	server.send(t, "before the stop")
	began := time.Now()
	server.stop(t, syscall.SIGTERM)
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("it took %v", took)
	}
}

// The same without a process, for what coverage and the race detector see of it.
func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	stdout := new(output)
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, environment("HOST=127.0.0.1", "PORT=0", "DIAL_TO=12025550101"), stdout, io.Discard)
	}()
	addressIn(t, stdout.String)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, variable := range []string{"PORT=x", "HOST=192.0.2.1"} {
		if err := run(ctx, environment(variable, "PORT=0"), io.Discard, io.Discard); err == nil {
			t.Errorf("started with %s", variable)
		}
	}
}

// guideApp is the app as Plivo's guide writes it.
func guideApp(logs io.Writer) http.Handler {
	m := martini.Classic()
	m.Logger(log.New(logs, "[martini] ", 0))
	m.Post("/dialstatus/", func(w http.ResponseWriter, r *http.Request) string {
		w.Header().Set("Content-Type", "application/xml")
		response := plivoxml.ResponseElement{
			Contents: []interface{}{
				new(plivoxml.DialElement).
					SetAction("http://foo.com/dialstatus/action/").
					SetMethod("POST").
					SetRedirect(true).
					SetContents([]interface{}{
						new(plivoxml.NumberElement).SetContents("12025550123"),
					}),
			},
		}
		return response.String()
	})
	m.Post("/dialstatus/action", func(w http.ResponseWriter, r *http.Request) string {
		status := r.FormValue("DialStatus")
		aleg := r.FormValue("DialALegUUID")
		bleg := r.FormValue("DialBLegUUID")
		result := status + " " + aleg + " " + bleg
		return result
	})
	return m
}

// written counts what it takes. Unlike io.Discard, for which log.Logger formats
// nothing.
type written int

func (n *written) Write(record []byte) (int, error) {
	*n += written(len(record))
	return len(record), nil
}

// bareHandler is the least that net/http can do: it parses the form and answers.
func bareHandler(w http.ResponseWriter, r *http.Request) {
	r.ParseForm()
	w.Header().Set("Content-Type", "application/xml")
	io.WriteString(w, hangsUp)
}

// bareWriter takes answers.
type bareWriter http.Header

func (w bareWriter) Header() http.Header              { return http.Header(w) }
func (w bareWriter) Write(answer []byte) (int, error) { return len(answer), nil }
func (w bareWriter) WriteHeader(status int)           {}

// benchmarkApp is this app with PUBLIC_URL and more variables.
func benchmarkApp(b *testing.B, variables ...string) http.Handler {
	cfg, err := configure(environment(append(variables, "PUBLIC_URL="+publicURL)...))
	if err != nil {
		b.Fatal(err)
	}
	return newApp(cfg, slog.New(slog.NewJSONHandler(new(written), nil)))
}

// benchmark answers a request again and again.
func benchmark(b *testing.B, app http.Handler, request *http.Request, form string) {
	writer := make(bareWriter)
	b.ReportAllocs()
	for b.Loop() {
		r := *request
		r.Form, r.PostForm, r.Body = nil, nil, io.NopCloser(strings.NewReader(form))
		app.ServeHTTP(writer, &r)
	}
}

// Each route, in the guide's app, in a bare net/http handler, in this app, and
// in this app with a signature to check. x-guide is the time in proportion to
// the guide's.
func Benchmark(b *testing.B) {
	for _, route := range []struct{ name, path, form string }{
		{"answer", "/dialstatus/", ringingCall},
		{"action", "/dialstatus/action/", completedDial},
	} {
		var guide float64
		for _, app := range []struct {
			name string
			http.Handler
		}{
			{"guide", guideApp(new(written))},
			{"floor", http.HandlerFunc(bareHandler)},
			{"dialstatus", benchmarkApp(b)},
			{"dialstatus-signed", benchmarkApp(b, "PLIVO_AUTH_TOKEN="+testToken)},
		} {
			b.Run(route.name+"/"+app.name, func(b *testing.B) {
				request := signed(route.path, route.form)
				answer := httptest.NewRecorder()
				if app.ServeHTTP(answer, signed(route.path, route.form)); answer.Code != 200 {
					b.Fatal(answer.Code, answer.Body)
				}
				benchmark(b, app, request, route.form)
				perOp := float64(b.Elapsed()) / float64(b.N)
				if app.name == "guide" {
					guide = perOp
				}
				b.ReportMetric(perOp/guide, "x-guide")
			})
		}
	}
}

// A forger's most expensive request: 7,000 fields in 64 KiB.
func BenchmarkForgery(b *testing.B) {
	form := strings.TrimPrefix(manyFields(7000), "&")
	form = form[:strings.LastIndex(form[:min(len(form), maxBody)], "&")]
	request := post("/dialstatus/action/", form, v3+": c2lnbmVk", v3Nonce+": "+testNonce)
	benchmark(b, benchmarkApp(b, "PLIVO_AUTH_TOKEN="+testToken), request, form)
}
