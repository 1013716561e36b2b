package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// Requests as Plivo sends them, modelled on captured traffic.
const (
	ringingCall    = "BillRate=0.005&CallStatus=ringing&CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9&CountryCode=US&Direction=inbound&Event=StartApp&From=12025550123&ParentAuthID=MAXXXXXXXXXXXXXXXXXX&RouteType=Domestic_Anchored&STIRAttestation=Not+Applicable&STIRVerification=Not+Applicable&SessionStart=2024-10-25+14%3A13%3A37.779297&To=12025550199"
	hangupCall     = "AnswerTime=2024-10-25+14%3A13%3A41&BillDuration=60&BillRate=0.005&CallStatus=completed&CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9&Direction=inbound&Duration=14&EndTime=2024-10-25+14%3A13%3A55&Event=Hangup&From=12025550123&HangupCause=NORMAL_CLEARING&HangupCauseCode=4000&HangupCauseName=Normal+Hangup&HangupSource=Caller&ParentAuthID=MAXXXXXXXXXXXXXXXXXX&SessionStart=2024-10-25+14%3A13%3A37.779297&StartTime=2024-10-25+14%3A13%3A37&To=12025550199"
	completedDial  = "BillRate=0.005&CallStatus=in-progress&CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9&DialALegUUID=38cb006a-e25d-4455-9862-27550dbea7e9&DialBLegUUID=c0a58e17-9d24-4f6b-8a13-72e5b4c9d806&DialHangupCause=NORMAL_CLEARING&DialRingStatus=true&DialStatus=completed&Direction=inbound&Event=Redirect&From=12025550123&To=12025550199"
	unansweredDial = "BillRate=0.005&CallStatus=in-progress&CallUUID=38cb006a-e25d-4455-9862-27550dbea7e9&DialALegUUID=38cb006a-e25d-4455-9862-27550dbea7e9&DialBLegUUID=&DialHangupCause=NO_ANSWER&DialRingStatus=true&DialStatus=no-answer&Direction=inbound&Event=Redirect&From=12025550123&To=12025550199"
)

// What they are answered, and what is reported of them.
const (
	dialXML   = `<Response><Dial action="http://example.com/dialstatus/action/" method="POST" redirect="true"><Number>+12025550123</Number></Dial></Response>`
	emptyXML  = `<Response></Response>`
	hangupXML = `<Response><Hangup></Hangup></Response>`

	ringingRecord = `{"level":"INFO","msg":"call","CallUUID":"38cb006a-e25d-4455-9862-27550dbea7e9","From":"12025550123","To":"12025550199","Direction":"inbound","CallStatus":"ringing"}`
	bareRecord    = `{"level":"INFO","msg":"call","CallUUID":"","From":"","To":"","Direction":"","CallStatus":""}`
)

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
	http.Handler
	log bytes.Buffer
}

func newTestApp(t testing.TB, variables ...string) *testApp {
	t.Helper()
	cfg, err := configure(environment(variables...))
	if err != nil {
		t.Fatal(err)
	}
	app := new(testApp)
	app.Handler = newApp(cfg, slog.New(slog.NewJSONHandler(&app.log, nil)))
	return app
}

// send answers a request, and what the app logged of it.
func (app *testApp) send(r *http.Request) (answer *httptest.ResponseRecorder, records []string) {
	app.log.Reset()
	answer = httptest.NewRecorder()
	app.ServeHTTP(answer, r)
	return answer, recordsOf(app.log.String())
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

// post makes a form post, with more headers as "Name: value". "Host:" sets the host.
func post(target, form string, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, target, strings.NewReader(form))
	if form != "" {
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		if name == "Host" {
			r.Host = value
		} else {
			r.Header.Set(name, value)
		}
	}
	return r
}

// wantXML checks for 200, the content type, the document byte for byte, and one record.
func wantXML(t *testing.T, app *testApp, r *http.Request, document, record string) {
	t.Helper()
	answer, records := app.send(r)
	if answer.Code != http.StatusOK || answer.Header().Get("Content-Type") != "application/xml" || answer.Body.String() != document {
		t.Errorf("answer: %d, %s\n got %s\nwant %s", answer.Code, answer.Header().Get("Content-Type"), answer.Body, document)
	}
	if len(records) != 1 || records[0] != record {
		t.Errorf("log:\n got %s\nwant %s", strings.Join(records, "\n     "), record)
	}
}

// wantRejection checks for the status, one plain line with the text, and one record of both.
func wantRejection(t *testing.T, app *testApp, r *http.Request, status int, text string) {
	t.Helper()
	answer, records := app.send(r)
	line := strings.TrimSuffix(answer.Body.String(), "\n")
	if answer.Code != status || !strings.HasPrefix(answer.Header().Get("Content-Type"), "text/plain") ||
		!strings.Contains(line, text) || strings.ContainsAny(line, "\n<") {
		t.Errorf("answer: %d, %s: %q; want %d and a line with %q", answer.Code, answer.Header().Get("Content-Type"), line, status, text)
	}
	if len(records) != 1 {
		t.Fatalf("log: %q, want one record", records)
	}
	var record struct {
		Level, Msg, Reason, Path string
		Status                   int
	}
	if err := json.Unmarshal([]byte(records[0]), &record); err != nil {
		t.Fatal(err)
	}
	if record.Level != "WARN" || record.Msg != "rejected" || record.Status != status || record.Reason != line || record.Path != r.URL.Path {
		t.Errorf("log: %s", records[0])
	}
}

func TestAnswerURL(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ name, path, form, document, record string }{
		{"a call reaches the number", "/dialstatus/", ringingCall, dialXML, ringingRecord},
		{"no slash at the end", "/dialstatus", ringingCall, dialXML, ringingRecord},
		{"an API call is answered", "/dialstatus/", "CallStatus=in-progress&Direction=outbound&CallUUID=1&From=2&To=3", dialXML,
			`{"level":"INFO","msg":"call","CallUUID":"1","From":"2","To":"3","Direction":"outbound","CallStatus":"in-progress"}`},
		{"nothing is sent", "/dialstatus/", "", dialXML, bareRecord},
		{"the call is over", "/dialstatus/", hangupCall, emptyXML,
			`{"level":"INFO","msg":"hangup","CallUUID":"38cb006a-e25d-4455-9862-27550dbea7e9","From":"12025550123","To":"12025550199","Direction":"inbound","CallStatus":"completed","HangupCause":"NORMAL_CLEARING","Duration":"14"}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantXML(t, app, post(test.path, test.form), test.document, test.record)
		})
	}
	for _, final := range []string{"completed", "busy", "failed", "timeout", "no-answer", "cancel"} {
		t.Run("the call is over: "+final, func(t *testing.T) {
			wantXML(t, app, post("/dialstatus/", "CallStatus="+final), emptyXML,
				`{"level":"INFO","msg":"hangup","CallUUID":"","From":"","To":"","Direction":"","CallStatus":"`+final+`","HangupCause":"","Duration":""}`)
		})
	}
}

func TestDialDocument(t *testing.T) {
	for _, test := range []struct {
		variables []string
		document  string
	}{
		{[]string{"DIAL_TO=12025550101"}, `<Dial action="http://example.com/dialstatus/action/" method="POST" redirect="true"><Number>12025550101</Number></Dial>`},
		{[]string{"DIAL_TO=+12025550101, sip:a.b@phone.plivo.com ,+12025550102"}, `<Dial action="http://example.com/dialstatus/action/" method="POST" redirect="true">` +
			`<Number>+12025550101</Number><User>sip:a.b@phone.plivo.com</User><Number>+12025550102</Number></Dial>`},
		{[]string{"DIAL_TO=sip:o'neil@example.com;transport=tcp?a=1&b=2"}, `<Dial action="http://example.com/dialstatus/action/" method="POST" redirect="true">` +
			`<User>sip:o&#39;neil@example.com;transport=tcp?a=1&amp;b=2</User></Dial>`},
		{[]string{"DIAL_TIMEOUT=1", "CALLER_ID=12025550150"}, `<Dial action="http://example.com/dialstatus/action/" method="POST" timeout="1" callerId="12025550150" redirect="true"><Number>+12025550123</Number></Dial>`},
	} {
		t.Run(test.variables[0], func(t *testing.T) {
			wantXML(t, newTestApp(t, test.variables...), post("/dialstatus/", ""), "<Response>"+test.document+"</Response>", bareRecord)
		})
	}
}

// The action URL is the one by which Plivo reached the server.
func TestActionURLOfDial(t *testing.T) {
	public := "PUBLIC_URL=https://calls.example.org/plivo/"
	for _, test := range []struct {
		name, publicURL string
		headers         []string
		base            string
	}{
		{"curl", "", []string{"Host: localhost:8080"}, "http://localhost:8080"},
		{"curl, IPv6", "", []string{"Host: [::1]:8080"}, "http://[::1]:8080"},
		{"ngrok", "", []string{"Host: abc.ngrok.app", "X-Forwarded-Proto: https", "X-Forwarded-Host: abc.ngrok.app"}, "https://abc.ngrok.app"},
		{"ngrok --host-header=rewrite", "", []string{"Host: localhost:8080", "X-Forwarded-Proto: https", "X-Forwarded-Host: abc.ngrok.app"}, "https://abc.ngrok.app"},
		{"two proxies: the first entry is the client's side", "", []string{"X-Forwarded-Proto: https , http", "X-Forwarded-Host: calls.example.org:8443, inner:80"}, "https://calls.example.org:8443"},
		{"only the scheme is forwarded", "", []string{"X-Forwarded-Proto: https"}, "https://example.com"},
		{"only the host is forwarded", "", []string{"X-Forwarded-Host: calls.example.org"}, "http://calls.example.org"},
		{"another scheme does not count", "", []string{"X-Forwarded-Proto: javascript"}, "http://example.com"},
		{"PUBLIC_URL", public, nil, "https://calls.example.org/plivo"},
		{"PUBLIC_URL before what a stranger says", public, []string{"Host: evil.example", "X-Forwarded-Proto: http", "X-Forwarded-Host: evil.example/"}, "https://calls.example.org/plivo"},
		{"PUBLIC_URL with a port", "PUBLIC_URL=HTTP://10.0.0.1:8080", nil, "http://10.0.0.1:8080"},
		{"PUBLIC_URL with markup in its path", `PUBLIC_URL=http://h/a"<b>`, nil, "http://h/a%22%3Cb%3E"},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantXML(t, newTestApp(t, test.publicURL), post("/dialstatus/", "", test.headers...),
				strings.Replace(dialXML, "http://example.com", test.base, 1), bareRecord)
		})
	}
	app := newTestApp(t)
	for _, host := range []string{"", `a"b`, "a b", "a<b>", "user@host", "host/path", "host?query", "host#fragment", "host:port", "host:", "host:65536", "[::1", "[:::]", "%zz", "h\x00st", "bücher.example"} {
		for _, header := range []string{"Host: ", "X-Forwarded-Host: "} {
			if host == "" && header == "X-Forwarded-Host: " {
				continue // as good as not there
			}
			t.Run(header+host, func(t *testing.T) {
				wantRejection(t, app, post("/dialstatus/", "", header+host), http.StatusBadRequest, "X-Forwarded-Host")
			})
		}
	}
}

func TestActionURL(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct{ status, level, spoken string }{
		{"completed", "INFO", ""},
		{"cancel", "INFO", ""},
		{"busy", "INFO", "The line is busy. Please try again later."},
		{"no-answer", "INFO", "Nobody answered. Please try again later."},
		{"timeout", "INFO", "The call could not be connected in time. Please try again later."},
		{"failed", "INFO", "The call could not be connected."},
		{"Completed", "WARN", "The call has ended."},
		{"a new one", "WARN", "The call has ended."},
	} {
		t.Run(test.status, func(t *testing.T) {
			document := hangupXML
			if test.spoken != "" {
				document = "<Response><Speak>" + test.spoken + "</Speak><Hangup></Hangup></Response>"
			}
			wantXML(t, app, post("/dialstatus/action/", "DialStatus="+test.status), document,
				`{"level":"`+test.level+`","msg":"dial","DialStatus":"`+test.status+`","DialALegUUID":"","DialBLegUUID":"","DialRingStatus":"","DialHangupCause":"","CallUUID":"","From":"","To":""}`)
		})
	}
	for _, form := range []string{"", "DialStatus=", "DialALegUUID=1&CallStatus=completed"} {
		t.Run("no DialStatus: "+form, func(t *testing.T) {
			wantRejection(t, app, post("/dialstatus/action", form), http.StatusBadRequest, "DialStatus")
		})
	}
}

// multipartForm is a form-data body, as PHLO's HTTP Request node can send, and its content type.
func multipartForm(t testing.TB, fields ...string) (body, contentType string) {
	t.Helper()
	var buffer strings.Builder
	writer := multipart.NewWriter(&buffer)
	for _, field := range fields {
		name, value, _ := strings.Cut(field, "=")
		if err := writer.WriteField(name, value); err != nil {
			t.Fatal(err)
		}
	}
	writer.Close()
	return buffer.String(), writer.FormDataContentType()
}

func TestReport(t *testing.T) {
	const completed = `{"level":"INFO","msg":"dial","DialStatus":"completed","DialALegUUID":"38cb006a-e25d-4455-9862-27550dbea7e9","DialBLegUUID":"c0a58e17-9d24-4f6b-8a13-72e5b4c9d806","DialRingStatus":"true","DialHangupCause":"NORMAL_CLEARING","CallUUID":"38cb006a-e25d-4455-9862-27550dbea7e9","From":"12025550123","To":"12025550199"}`
	const unanswered = `{"level":"INFO","msg":"dial","DialStatus":"no-answer","DialALegUUID":"38cb006a-e25d-4455-9862-27550dbea7e9","DialBLegUUID":"","DialRingStatus":"true","DialHangupCause":"NO_ANSWER","CallUUID":"38cb006a-e25d-4455-9862-27550dbea7e9","From":"12025550123","To":"12025550199"}`
	const unansweredXML = "<Response><Speak>Nobody answered. Please try again later.</Speak><Hangup></Hangup></Response>"
	multipartBody, multipartType := multipartForm(t, strings.Split(completedDial, "&")...)
	app := newTestApp(t)
	for _, test := range []struct {
		name     string
		request  *http.Request
		document string
		record   string
	}{
		{"urlencoded", post("/dialstatus/action", completedDial), hangupXML, completed},
		{"urlencoded, with a charset", post("/dialstatus/action/", completedDial, "Content-Type: Application/X-WWW-Form-Urlencoded; charset=utf-8"), hangupXML, completed},
		{"nobody answers", post("/dialstatus/action", unansweredDial), unansweredXML, unanswered},
		{"multipart", post("/dialstatus/action/", multipartBody, "Content-Type: "+multipartType), hangupXML, completed},
		{"query", post("/dialstatus/action/?"+completedDial, ""), hangupXML, completed},
		{"query and body: the body counts", post("/dialstatus/action/?DialStatus=busy&"+completedDial, completedDial), hangupXML, completed},
		{"anything in a value", post("/dialstatus/action/", "DialStatus=completed&DialALegUUID=%22%5C%0A%0D%00%E2%80%A8%3C/Response%3E&DialBLegUUID=%22,%22DialStatus%22:%22busy&From=%ff%C3%BC"), hangupXML,
			`{"level":"INFO","msg":"dial","DialStatus":"completed","DialALegUUID":"\"\\\n\r\u0000\u2028</Response>","DialBLegUUID":"\",\"DialStatus\":\"busy","DialRingStatus":"","DialHangupCause":"","CallUUID":"","From":"\ufffdü","To":""}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantXML(t, app, test.request, test.document, test.record)
		})
	}
}

func TestRejections(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct {
		method, target string
		status         int
		text           string
	}{
		{"GET", "/dialstatus/", 405, "send POST"},
		{"HEAD", "/dialstatus", 405, ""},
		{"PUT", "/dialstatus/action", 405, "send POST"},
		{"DELETE", "/dialstatus/action/", 405, "send POST"},
		{"post", "/dialstatus/action/", 405, "send POST"},
		{"POST", "/", 404, "/dialstatus/action/"},
		{"POST", "/dialstatus//", 404, "/dialstatus/"},
		{"POST", "/dialstatus/action/x", 404, "/dialstatus/"},
		{"POST", "/x/dialstatus/", 404, "/dialstatus/"},
		{"GET", "/dial_status.go", 404, "/dialstatus/"},
	} {
		t.Run(test.method+" "+test.target, func(t *testing.T) {
			r := httptest.NewRequest(test.method, test.target, nil)
			wantRejection(t, app, r, test.status, test.text)
			answer, _ := app.send(r)
			if allow := answer.Header().Get("Allow"); (allow == "POST") != (test.status == 405) {
				t.Errorf("Allow: %q", allow)
			}
		})
	}
}

func TestBadInput(t *testing.T) {
	app := newTestApp(t)
	for _, test := range []struct {
		name, contentType, body string
		status                  int
		text                    string
	}{
		{"bad percent escape", "application/x-www-form-urlencoded", "DialStatus=%zz", 400, `invalid URL escape "%zz"`},
		{"multipart without a boundary", "multipart/form-data", "x", 400, "boundary"},
		{"multipart with another boundary", "multipart/form-data; boundary=a", "--b\r\n", 400, "multipart"},
		{"multipart that breaks off", "multipart/form-data; boundary=a", "--a\r\nContent-Disposition: form-data; name=x\r\n\r\ny", 400, "unexpected EOF"},
	} {
		for _, path := range []string{"/dialstatus/", "/dialstatus/action/"} {
			t.Run(test.name+" "+path, func(t *testing.T) {
				wantRejection(t, app, post(path, test.body, "Content-Type: "+test.contentType), test.status, test.text)
			})
		}
	}
	t.Run("bad percent escape in the query", func(t *testing.T) {
		wantRejection(t, app, post("/dialstatus/action/?a=%zz", completedDial), 400, `invalid URL escape "%zz"`)
	})
}

type panickingBody struct{ io.ReadCloser }

func (panickingBody) Read([]byte) (int, error) { panic("s3cret\ninternals") }

func TestPanicIsContained(t *testing.T) {
	app := newTestApp(t)
	r := post("/dialstatus/", ringingCall)
	r.Body = panickingBody{}
	answer, records := app.send(r)
	if answer.Code != 500 || answer.Body.String() != "internal server error\n" {
		t.Errorf("answer: %d %q", answer.Code, answer.Body)
	}
	if len(records) != 1 || !strings.Contains(records[0], `"level":"ERROR"`) || !strings.Contains(records[0], "panickingBody.Read") {
		t.Errorf("log: %s", records)
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

func TestConfigurationErrors(t *testing.T) {
	const (
		dialTo      = `: want E.164 numbers (+12025550123) and SIP URIs (sip:user@example.com), separated by commas`
		callerID    = `: want an E.164 number (+12025550123)`
		dialTimeout = `: want whole seconds, at least 1`
		publicURL   = `: want http or https, a host, perhaps a path; no user, query or fragment`
		port        = `: want a port number, or 0 for any free port`
	)
	for _, test := range []struct{ variables, problems []string }{
		{[]string{"DIAL_TO=2025"}, []string{`DIAL_TO "2025"` + dialTo}},
		{[]string{"DIAL_TO=+02025550123"}, []string{`DIAL_TO "+02025550123"` + dialTo}},
		{[]string{"DIAL_TO=+1202555012345678"}, []string{`DIAL_TO "+1202555012345678"` + dialTo}},
		{[]string{"DIAL_TO=+1 202 555 0123"}, []string{`DIAL_TO "+1 202 555 0123"` + dialTo}},
		{[]string{"DIAL_TO=12025550123,"}, []string{`DIAL_TO ""` + dialTo}},
		{[]string{"DIAL_TO=12025550123,<x>,me"}, []string{`DIAL_TO "<x>"` + dialTo, `DIAL_TO "me"` + dialTo}},
		{[]string{"DIAL_TO=sip:example.com"}, []string{`DIAL_TO "sip:example.com"` + dialTo}},
		{[]string{"DIAL_TO=tel:+12025550123"}, []string{`DIAL_TO "tel:+12025550123"` + dialTo}},
		{[]string{"DIAL_TO=sip:a@b</User><Number>1"}, []string{`DIAL_TO "sip:a@b</User><Number>1"` + dialTo}},
		{[]string{"DIAL_TO=sip:a@b\nc"}, []string{`DIAL_TO "sip:a@b\nc"` + dialTo}},
		{[]string{"CALLER_ID=Alice"}, []string{`CALLER_ID "Alice"` + callerID}},
		{[]string{"CALLER_ID=12025550123,12025550124"}, []string{`CALLER_ID "12025550123,12025550124"` + callerID}},
		{[]string{"DIAL_TIMEOUT=0"}, []string{`DIAL_TIMEOUT "0"` + dialTimeout}},
		{[]string{"DIAL_TIMEOUT=-1"}, []string{`DIAL_TIMEOUT "-1"` + dialTimeout}},
		{[]string{"DIAL_TIMEOUT=1.5"}, []string{`DIAL_TIMEOUT "1.5"` + dialTimeout}},
		{[]string{"DIAL_TIMEOUT=30s"}, []string{`DIAL_TIMEOUT "30s"` + dialTimeout}},
		{[]string{"DIAL_TIMEOUT=99999999999999999999"}, []string{`DIAL_TIMEOUT "99999999999999999999"` + dialTimeout}},
		{[]string{"PUBLIC_URL=example.com"}, []string{`PUBLIC_URL "example.com"` + publicURL}},
		{[]string{"PUBLIC_URL=ftp://example.com"}, []string{`PUBLIC_URL "ftp://example.com"` + publicURL}},
		{[]string{"PUBLIC_URL=https://"}, []string{`PUBLIC_URL "https://"` + publicURL}},
		{[]string{"PUBLIC_URL=https://example.com:65536"}, []string{`PUBLIC_URL "https://example.com:65536"` + publicURL}},
		{[]string{"PUBLIC_URL=https://example.com/?"}, []string{`PUBLIC_URL "https://example.com/?"` + publicURL}},
		{[]string{"PUBLIC_URL=https://example.com/?a=b"}, []string{`PUBLIC_URL "https://example.com/?a=b"` + publicURL}},
		{[]string{"PUBLIC_URL=https://example.com/#"}, []string{`PUBLIC_URL "https://example.com/#"` + publicURL}},
		{[]string{"PUBLIC_URL=https://exa mple.com"}, []string{`PUBLIC_URL "https://exa mple.com"` + publicURL}},
		{[]string{"PUBLIC_URL=https://user:s3cret@example.com"}, []string{`PUBLIC_URL "example.com"` + publicURL}},
		{[]string{"PORT=http"}, []string{`PORT "http"` + port}},
		{[]string{"PORT=65536"}, []string{`PORT "65536"` + port}},
		{[]string{"PORT=-1"}, []string{`PORT "-1"` + port}},
		{[]string{"PORT=a", "DIAL_TO=b", "CALLER_ID=c", "DIAL_TIMEOUT=d", "PUBLIC_URL=e"}, []string{
			`PORT "a"` + port, `DIAL_TO "b"` + dialTo, `CALLER_ID "c"` + callerID, `DIAL_TIMEOUT "d"` + dialTimeout, `PUBLIC_URL "e"` + publicURL}},
	} {
		t.Run(strings.Join(test.variables, " "), func(t *testing.T) {
			_, err := configure(environment(test.variables...))
			if want := strings.Join(test.problems, "\n"); err == nil || err.Error() != want {
				t.Errorf("got:\n%v\nwant:\n%s", err, want)
			}
		})
	}
}

// TestMain lets the test binary be the server itself, so that the tests have a process of it.
func TestMain(m *testing.M) {
	if os.Getenv("DIALSTATUS_TEST_SERVER") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// process is a running server.
type process struct {
	*exec.Cmd
	url    string
	log    *bufio.Reader // after the first record
	stderr bytes.Buffer
}

// start runs the server with these variables, on a free port unless they say otherwise.
func start(t *testing.T, variables ...string) *process {
	t.Helper()
	executable, err := filepath.Abs(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.Command(executable)}
	p.Dir = t.TempDir()
	p.Env = append([]string{"DIALSTATUS_TEST_SERVER=1", "GOCOVERDIR=" + p.Dir, "HOST=127.0.0.1", "PORT=0"}, variables...)
	p.Stderr = &p.stderr
	stdout, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Process.Kill() })
	p.log = bufio.NewReader(stdout)
	first, _ := p.log.ReadString('\n')
	var listening struct{ Msg, Address string }
	if json.Unmarshal([]byte(first), &listening); listening.Msg == "listening" {
		p.url = "http://" + listening.Address
	}
	return p
}

// stop sends a signal, and answers the rest of the log when the process has ended with status 0.
func (p *process) stop(t *testing.T, signal os.Signal) (records []string) {
	t.Helper()
	p.Process.Signal(signal)
	rest, _ := io.ReadAll(p.log)
	if err := p.Wait(); err != nil || p.stderr.Len() > 0 {
		t.Errorf("after %v: %v, stderr: %q", signal, err, &p.stderr)
	}
	return recordsOf(string(rest))
}

func TestServer(t *testing.T) {
	for _, signal := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(signal.String(), func(t *testing.T) {
			server := start(t)
			os.Mkdir(filepath.Join(server.Dir, "public"), 0o755)
			os.WriteFile(filepath.Join(server.Dir, "public", "index.html"), []byte("a file"), 0o644)

			answer, err := http.Post(server.url+"/dialstatus/", "application/x-www-form-urlencoded", strings.NewReader(ringingCall))
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(answer.Body)
			if want := strings.Replace(dialXML, "http://example.com", server.url, 1); string(body) != want {
				t.Errorf("got %s, want %s", body, want)
			}
			if answer, err := http.Get(server.url + "/index.html"); err != nil || answer.StatusCode != 404 {
				t.Errorf("a file: %v, %v", answer, err)
			}

			records := server.stop(t, signal)
			want := []string{
				`{"level":"WARN","msg":"DIAL_TO is not set: calls are forwarded to +12025550123, a number reserved for fiction"}`,
				ringingRecord,
				`{"level":"WARN","msg":"rejected","status":404,"reason":"not found: send to /dialstatus/ or /dialstatus/action/","path":"/index.html"}`,
			}
			if got := strings.Join(records, "\n"); got != strings.Join(want, "\n") {
				t.Errorf("log:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
			}
			if _, err := net.Dial("tcp", strings.TrimPrefix(server.url, "http://")); err == nil {
				t.Error("something still listens")
			}
		})
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
		{"every problem is told", []string{"DIAL_TO=me", "PORT=http"}, []string{`PORT "http": want`, `DIAL_TO "me": want`}},
		{"the port is taken", []string{"PORT=" + port}, []string{`HOST "127.0.0.1", PORT "` + port + `": listen tcp 127.0.0.1:` + port + ": bind: address already in use"}},
		{"the host is not here", []string{"HOST=192.0.2.1"}, []string{`HOST "192.0.2.1", PORT "0": listen tcp 192.0.2.1:0: bind:`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := start(t, test.variables...)
			server.Wait()
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

// The same without a process, for what coverage and the race detector see of it.
func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	reader, writer := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- run(ctx, environment("HOST=127.0.0.1", "PORT=0", "DIAL_TO=12025550101"), writer) }()
	log := bufio.NewReader(reader)
	if line, _ := log.ReadString('\n'); !strings.Contains(line, "listening") {
		t.Errorf("first record: %s", line)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, variable := range []string{"PORT=x", "HOST=192.0.2.1"} {
		if err := run(ctx, environment(variable, "PORT=0"), io.Discard); err == nil {
			t.Errorf("started with %s", variable)
		}
	}
}
