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
	app.ServeHTTP(afterTheLog{answer, &app.log}, r)
	return answer, recordsOf(app.log.String())
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
func wantRejection(t *testing.T, app *testApp, r *http.Request, status int, text string) (answer *httptest.ResponseRecorder) {
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
	return answer
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
		{"two proxies: the first entry is the client's side", "", []string{"X-Forwarded-Proto: https , http", "X-Forwarded-Host: calls.example.org:8443 , inner:80"}, "https://calls.example.org:8443"},
		{"only the scheme is forwarded", "", []string{"X-Forwarded-Proto: https"}, "https://example.com"},
		{"only the host is forwarded", "", []string{"X-Forwarded-Host: calls.example.org"}, "http://calls.example.org"},
		{"another scheme does not count", "", []string{"X-Forwarded-Proto: javascript"}, "http://example.com"},
		{"PUBLIC_URL", public, nil, "https://calls.example.org/plivo"},
		{"PUBLIC_URL before what a stranger says", public, []string{"Host: evil.example", "X-Forwarded-Proto: http", "X-Forwarded-Host: evil.example/"}, "https://calls.example.org/plivo"},
		{"PUBLIC_URL with a port", "PUBLIC_URL=http://10.0.0.1:8080", nil, "http://10.0.0.1:8080"},
		{"PUBLIC_URL with an escape in its path", "PUBLIC_URL=http://h/a%20b", nil, "http://h/a%20b"},
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
			answer := wantRejection(t, app, httptest.NewRequest(test.method, test.target, nil), test.status, test.text)
			if allow := answer.Header().Get("Allow"); (allow == "POST") != (test.status == 405) {
				t.Errorf("Allow: %q", allow)
			}
		})
	}
}

func TestBadInput(t *testing.T) {
	app := newTestApp(t)
	field := "--a\r\nContent-Disposition: form-data; name=DialStatus\r\n\r\n"
	file := "--a\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n"
	for _, test := range []struct {
		name, contentType, body string
		status                  int
		text                    string
	}{
		{"too long", "application/x-www-form-urlencoded", strings.Repeat("a", maxBody+1), 413, "65536 bytes"},
		{"too long, multipart", "multipart/form-data; boundary=a", field + strings.Repeat("a", maxBody) + "\r\n--a--", 413, "65536 bytes"},
		{"too long, a file", "multipart/form-data; boundary=a", file + strings.Repeat("a", maxBody) + "\r\n--a--", 413, "65536 bytes"},
		{"JSON", "application/json", `{"DialStatus":"busy"}`, 415, "application/x-www-form-urlencoded"},
		{"text", "text/plain", "DialStatus=busy", 415, "application/x-www-form-urlencoded"},
		{"no content type", "", "DialStatus=busy", 415, "application/x-www-form-urlencoded"},
		{"a content type that is none", ";=", "DialStatus=busy", 415, "application/x-www-form-urlencoded"},
		{"bad percent escape", "application/x-www-form-urlencoded", "DialStatus=%zz", 400, `invalid URL escape "%zz"`},
		{"multipart without a boundary", "multipart/form-data", field + "busy\r\n--a--", 400, "boundary"},
		{"multipart with another boundary", "multipart/form-data; boundary=b", field + "busy\r\n--a--", 400, "multipart"},
		{"multipart that breaks off", "multipart/form-data; boundary=a", field + "busy", 400, "unexpected EOF"},
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
		var read countingReader
		r := post("/dialstatus/", "", "Content-Type: application/x-www-form-urlencoded")
		r.Body = io.NopCloser(&read)
		wantRejection(t, app, r, 413, "65536 bytes")
		if read > maxBody+1 {
			t.Errorf("read %d bytes", read)
		}
	})
}

// countingReader counts what is read of an endless body.
type countingReader int

func (read *countingReader) Read(p []byte) (int, error) {
	*read += countingReader(len(p))
	return copy(p, bytes.Repeat([]byte("a"), len(p))), nil
}

func TestLimitsAreNotTooNarrow(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	app := newTestApp(t)
	file := strings.Repeat("a", 60<<10)
	for _, test := range []struct{ name, query, contentType, body string }{
		{"a body at the limit", "", "application/x-www-form-urlencoded", "DialStatus=completed&a=" + strings.Repeat("a", maxBody-23)},
		{"a file", "", "multipart/form-data; boundary=a", "--a\r\nContent-Disposition: form-data; name=DialStatus\r\n\r\ncompleted\r\n" +
			"--a\r\nContent-Disposition: form-data; name=f; filename=f\r\n\r\n" + file + "\r\n--a--"},
		{"JSON with no body", "?DialStatus=completed", "application/json", ""},
		{"an odd parameter", "", "application/x-www-form-urlencoded; charset", "DialStatus=completed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			answer, _ := app.send(post("/dialstatus/action/"+test.query, test.body, "Content-Type: "+test.contentType))
			if answer.Code != 200 || answer.Body.String() != hangupXML {
				t.Errorf("%d %s", answer.Code, answer.Body)
			}
			if files, _ := os.ReadDir(os.TempDir()); len(files) > 0 {
				t.Errorf("temporary files: %v", files)
			}
		})
	}
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

// sign is Plivo's V3 signature of a POST, written from its description: the URL, "?" and the query
// sorted by name and value, "." and the form sorted the same with nothing between, "." and the nonce;
// HMAC-SHA256 with the auth token, base64. As the published vectors show, the "?" stands before
// the form, too, where there is no query, and the "." only between a query and a form.
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

// The vectors of plivo-go's utils_test.go, TestValidateSignatureV3Pass1 and Pass3.
func TestPublishedSignatures(t *testing.T) {
	const (
		authToken = "Y2Q2ZDgxZmY5YWRiOTI5YmQ1Njg0MTAxZWIyOTc4"
		nonce     = "31627761595286130198"
		page      = "https://plivobin.non-prod.plivops.com/api/v1/validate_signature03.xml"
	)
	form := url.Values{
		"Direction": {"outbound"}, "From": {"19792014278"}, "ALegUUID": {"3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"},
		"CallStatus": {"in-progress"}, "BillRate": {"0.002"}, "ParentAuthID": {"MANWVLYTK4ZWU1YTY4QA"},
		"To":              {"sip:PlivoSignature382029104058171078704104@phone-qa.voice.plivodev.com"},
		"ALegRequestUUID": {"3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"}, "CallUUID": {"3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"},
		"RequestUUID":  {"3e82ae9d-2c78-4d85-b1a4-6eae7dbafb36"},
		"SIP-H-To":     {"<sip:PlivoSignature382029104058171078704104@52.9.11.55;transport=udp>;tag=1"},
		"SessionStart": {"2020-04-08 11:34:33.238707"}, "Event": {"StartApp"},
	}.Encode()
	for called, signature := range map[string]string{
		page + "/?a=b&c=d": "k7Pusd4OxCIjR5IfA9iedDNu/h/gbdYqdzG/MiYtd1c=",
		page:               "iAjE5QqI37mbkYe4w3jTMudqEzbDufdqi7sYwTu64e0=",
	} {
		if got := sign(authToken, called, form, nonce); got != signature {
			t.Errorf("%s: the tests sign %s, Plivo %s", called, got, signature)
		}
		r := post(called, form, v3+": "+signature, v3Nonce+": "+nonce)
		readForm(r)
		base, _, _ := strings.Cut(called, "/api")
		if !isSigned(r, base, authToken) {
			t.Errorf("%s: not accepted", called)
		}
		if isSigned(r, base+"x", authToken) {
			t.Errorf("%s: accepted for another URL", called)
		}
	}
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

// signed makes a form post with a signature for it, in the header of that name.
func signed(target, form, header string, headers ...string) *http.Request {
	return post(target, form, append(headers,
		header+": "+sign(testToken, publicURL+target, form, testNonce),
		v3Nonce+": "+testNonce)...)
}

// withLogin makes a form post as PHLO's HTTP Request node does with Basic Auth.
func withLogin(user, password string) *http.Request {
	r := post("/dialstatus/action/", completedDial)
	r.SetBasicAuth(user, password)
	return r
}

// manyFields is n more fields for a form.
func manyFields(n int) string {
	var form strings.Builder
	for i := range n {
		fmt.Fprintf(&form, "&field%d=", i)
	}
	return form.String()
}

func TestPlivoMayCall(t *testing.T) {
	configured := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin, "PUBLIC_URL="+publicURL)
	tunnelled := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken)
	signature := sign(testToken, publicURL+"/dialstatus/action/", completedDial, testNonce)
	several := func(signatures string) *http.Request {
		return post("/dialstatus/action/", completedDial, v3+": "+signatures, v3Nonce+": "+testNonce)
	}
	twice := func(first, second string) *http.Request {
		r := several(first)
		r.Header.Add(v3, second)
		return r
	}
	multipartBody, multipartType := multipartForm(t, "DialStatus=completed")
	multipartRequest := post("/dialstatus/action/", multipartBody, "Content-Type: "+multipartType,
		v3+": "+sign(testToken, publicURL+"/dialstatus/action/", "DialStatus=completed", testNonce), v3Nonce+": "+testNonce)
	for _, test := range []struct {
		name    string
		app     *testApp
		request *http.Request
	}{
		{"answer URL", configured, signed("/dialstatus/", ringingCall, v3)},
		{"answer URL without its slash", configured, signed("/dialstatus", ringingCall, v3)},
		{"action URL", configured, signed("/dialstatus/action/", completedDial, v3)},
		{"the main account's signature", configured, signed("/dialstatus/action/", completedDial, maV3)},
		{"a query", configured, signed("/dialstatus/action/?z=1&a=b%20c", completedDial, v3)},
		{"no form, only a query", configured, signed("/dialstatus/action/?DialStatus=busy", "", v3)},
		{"neither form nor query", configured, signed("/dialstatus/", "", v3)},
		{"a repeated field", configured, signed("/dialstatus/action/", completedDial+"&From=1", v3)},
		{"a repeated field, not in order", configured, signed("/dialstatus/action/", completedDial+"&To=2&To=1&To=", v3)},
		{"a repeated name in the query", configured, signed("/dialstatus/action/?a=2&b=&a=1", completedDial, v3)},
		{"600 fields", configured, signed("/dialstatus/action/", "DialStatus=busy"+manyFields(599), v3)},
		{"600 fields in the query", configured, signed("/dialstatus/action/?DialStatus=busy"+manyFields(599), "", v3)},
		{"a query value that ends in a dot", configured, signed("/dialstatus/action/?a=b.", completedDial, v3)},
		{"a query value that ends in an ampersand", configured, signed("/dialstatus/action/?a=b%26", completedDial, v3)},
		{"a query, and a value that ends in a dot", configured, signed("/dialstatus/action/?a=b", completedDial+".", v3)},
		{"empty values", configured, signed("/dialstatus/action/?a=&b", completedDial+"&z=&y", v3)},
		{"not ASCII", configured, signed("/dialstatus/action/?name=J%C3%BCrgen", completedDial+"&Name=%E7%8E%8B", v3)},
		{"semicolons", configured, signed("/dialstatus/action/?to=sip:ann@example.com;transport=tls", completedDial+"&Via=a;b=c", v3)},
		{"an escaped path", configured, signed("/dialstatus%2Faction/", completedDial, v3)},
		{"PUBLIC_URL with an escape", newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PUBLIC_URL="+publicURL+"/a%20b"), post("/dialstatus/action/", completedDial, v3+": "+sign(testToken, publicURL+"/a%20b/dialstatus/action/", completedDial, testNonce), v3Nonce+": "+testNonce)},
		{"the second of two header lines", configured, twice("c2lnbmVk", signature)},
		{"a value that ends in a dot", configured, signed("/dialstatus/action/", completedDial+".", v3)},
		{"multipart", configured, multipartRequest},
		{"several tokens", configured, several("c2lnbmVk," + signature + ",c2lnbmVk")},
		{"several tokens, spaces", configured, several("c2lnbmVk , " + signature + " ,")},
		{"one header is for another token", configured, signed("/dialstatus/action/", completedDial, maV3, v3+": c2lnbmVk")},
		{"PHLO's login", configured, withLogin("phlo", "pass:word")},
		{"ngrok", tunnelled, signed("/dialstatus/", ringingCall, v3, "Host: localhost:8080", "X-Forwarded-Proto: https", "X-Forwarded-Host: calls.example.org")},
	} {
		t.Run(test.name, func(t *testing.T) {
			answer, records := test.app.send(test.request)
			if answer.Code != 200 || !strings.HasPrefix(answer.Body.String(), "<Response>") || len(records) != 1 {
				t.Errorf("%d %s\nlog: %s", answer.Code, answer.Body, records)
			}
		})
	}
	for name, app := range map[string]*testApp{
		"without a token everybody may call":                newTestApp(t),
		"without a token the login is not asked for":        newTestApp(t, "PHLO_BASIC_AUTH="+testLogin),
		"without a token a wrong signature does not matter": newTestApp(t, "PUBLIC_URL="+publicURL),
	} {
		t.Run(name, func(t *testing.T) {
			wantXML(t, app, post("/dialstatus/action", "DialStatus=cancel", v3+": c2lnbmVk"), hangupXML,
				`{"level":"INFO","msg":"dial","DialStatus":"cancel","DialALegUUID":"","DialBLegUUID":"","DialRingStatus":"","DialHangupCause":"","CallUUID":"","From":"","To":""}`)
		})
	}
}

func TestForgeries(t *testing.T) {
	app := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin, "PUBLIC_URL="+publicURL)
	withoutLogin := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken, "PUBLIC_URL="+publicURL)
	tunnelled := newTestApp(t, "PLIVO_AUTH_TOKEN="+testToken)

	const action, query = "/dialstatus/action/", "/dialstatus/action/?a=b"
	// forged posts a form with the signature of another.
	forged := func(target, form, signedTarget, signedForm string, headers ...string) *http.Request {
		r := signed(signedTarget, signedForm, v3)
		return post(target, form, append([]string{v3 + ": " + r.Header.Get(v3), v3Nonce + ": " + testNonce}, headers...)...)
	}
	with := func(headers ...string) *http.Request {
		return forged(action, completedDial, action, completedDial, headers...)
	}
	replace := func(old, new string) string { return strings.Replace(completedDial, old, new, 1) }
	v2 := keyedHash(testToken, publicURL+action+testNonce)

	for _, test := range []struct {
		name    string
		app     *testApp
		request *http.Request
	}{
		{"changed field", app, forged(action, replace("=completed", "=busy"), action, completedDial)},
		{"added field", app, forged(action, completedDial+"&X=", action, completedDial)},
		{"added second value", app, forged(action, completedDial+"&DialStatus=busy", action, completedDial)},
		{"dropped field", app, forged(action, replace("&DialStatus=completed", ""), action, completedDial)},
		{"dropped form", app, forged(action, "", action, completedDial)},
		{"changed query", app, forged(action+"?a=c", completedDial, query, completedDial)},
		{"added query", app, forged(query, completedDial, action, completedDial)},
		{"dropped query", app, forged(action, completedDial, query, completedDial)},
		{"added second value in the query", app, forged(query+"&a=c", completedDial, query, completedDial)},
		{"added fragment", app, forged(query+"#&HangupCause=x", completedDial, query, completedDial)},
		{"added fragment without a query", app, forged(action+"?#&HangupCause=x", completedDial, action, completedDial)},
		{"added dots behind a query", app, forged(query, completedDial+"..", query, completedDial)},
		{"added dots in the query", app, forged(query+"%2E", "", query, "")},
		{"added ampersands in the query", app, forged(query+"%26%26", completedDial, query, completedDial)},
		{"a nonce that ends a field", app, post(action, strings.TrimSuffix(completedDial, ".5"), v3+": "+sign(testToken, publicURL+action, completedDial+".5", testNonce), v3Nonce+": 5."+testNonce)},
		{"part of the form in the nonce", app, post(action, "DialStatus=busy", v3+": "+sign(testToken, publicURL+action, "DialStatus=busy&To=1.2", testNonce), v3Nonce+": 2."+testNonce)},
		{"fragment that is signed", app, signed(query+"#c", completedDial, v3)},
		{"other path", app, forged("/dialstatus/", completedDial, action, completedDial)},
		{"other slash", app, forged("/dialstatus/action", completedDial, action, completedDial)},
		{"other host", tunnelled, with("X-Forwarded-Proto: https", "Host: evil.example")},
		{"other forwarded host", tunnelled, with("X-Forwarded-Proto: https", "Host: calls.example.org", "X-Forwarded-Host: evil.example")},
		{"other scheme", tunnelled, with("X-Forwarded-Proto: http", "Host: calls.example.org")},
		{"other port", tunnelled, with("X-Forwarded-Proto: https", "Host: calls.example.org:8443")},
		{"other nonce", app, with(v3Nonce + ": 05429567804466091623")},
		{"empty nonce", app, post(action, completedDial, v3+": "+sign(testToken, publicURL+action, completedDial, ""), v3Nonce+": ")},
		{"no nonce", app, post(action, completedDial, v3+": "+sign(testToken, publicURL+action, completedDial, ""))},
		{"other token", app, with(v3 + ": " + sign("other", publicURL+action, completedDial, testNonce))},
		{"empty token", app, with(v3 + ": " + sign("", publicURL+action, completedDial, testNonce))},
		{"other signature", app, with(v3 + ": c2lnbmVk")},
		{"part of the signature", app, with(v3 + ": " + with().Header.Get(v3)[:43])},
		{"empty signature", app, with(v3 + ": ")},
		{"empty signatures", app, with(v3+": ,, ,", maV3+": ,")},
		{"no headers", app, post(action, completedDial)},
		{"no headers, answer URL", app, post("/dialstatus/", ringingCall)},
		{"V2 only", app, post(action, completedDial, "X-Plivo-Signature-V2: "+v2, "X-Plivo-Signature-Ma-V2: "+v2, "X-Plivo-Signature-V2-Nonce: "+testNonce)},
		{"V2's signature as V3's", app, with(v3 + ": " + v2)},
		{"other password", app, withLogin("phlo", "pass:wor")},
		{"longer password", app, withLogin("phlo", "pass:words")},
		{"other user", app, withLogin("plho", "pass:word")},
		{"empty login", app, withLogin("", "")},
		{"empty login where none is set", withoutLogin, withLogin("", "")},
		{"login where none is set", withoutLogin, withLogin("phlo", "pass:word")},
		{"another way to log in", app, post(action, completedDial, "Authorization: Bearer "+testLogin)},
		{"a login that does not decode", app, post(action, completedDial, "Authorization: Basic "+testLogin)},
	} {
		t.Run(test.name, func(t *testing.T) {
			wantRejection(t, test.app, test.request, http.StatusForbidden, "forbidden")
			log := test.app.log.String()
			if !strings.Contains(log, `"url":"http`) || !strings.Contains(log, "PUBLIC_URL") {
				t.Errorf("no URL or no hint: %s", log)
			}
			for _, secret := range []string{testToken, "pass:word", "pass:wor", test.request.Header.Get(v3), test.request.Header.Get("Authorization")} {
				if len(secret) > 5 && strings.Contains(log, secret) {
					t.Errorf("%s in the log: %s", secret, log)
				}
			}
		})
	}
	t.Run("the URL that was checked", func(t *testing.T) {
		_, records := tunnelled.send(post("/dialstatus/action?a=b", completedDial, "Host: localhost:8080"))
		if !strings.Contains(records[0], `"url":"http://localhost:8080/dialstatus/action?a=b"`) {
			t.Errorf("log: %s", records[0])
		}
	})
}

func TestDocumentIsNeverTheTextOfAnError(t *testing.T) {
	defer func() {
		if cause := recover(); !strings.Contains(fmt.Sprint(cause), "unsupported type") {
			t.Errorf("panic: %v", cause)
		}
	}()
	document(make(chan int))
}

func TestWhereToListen(t *testing.T) {
	for address, variables := range map[string][]string{":8080": nil, "[::1]:80": {"HOST=::1", "PORT=80"}} {
		if cfg, err := configure(environment(variables...)); cfg.address != address || err != nil {
			t.Errorf("%q: %q, %v", variables, cfg.address, err)
		}
	}
}

func TestConfigurationErrors(t *testing.T) {
	const (
		dialTo      = "E.164 numbers, country code first (+12025550123), and SIP URIs (sip:user@example.com), separated by commas"
		callerID    = "an E.164 number of your account (+12025550123)"
		dialTimeout = "whole seconds to let it ring, at least 1"
		publicURL   = "the URL by which Plivo reaches this server: http or https, a host, perhaps a path, and nothing else"
		port        = "a port number to listen on, 0 to 65535"
		authToken   = "the auth token as the console shows it"
		basicAuth   = "user:password of PHLO's HTTP Request node"
	)
	for _, test := range []struct {
		variable, want string
		values         []string // each is shown
	}{
		{"DIAL_TO", dialTo, []string{"2025", "+120255", "+02025550123", "+1202555012345678", "+1 202 555 0123", "12025550123,",
			",12025550123", "12025550123,<x>,me", "sip:example.com", "tel:+12025550123"}},
		{"CALLER_ID", callerID, []string{"Alice", "12025550123,12025550124"}},
		{"DIAL_TIMEOUT", dialTimeout, []string{"0", "-1", "1.5", "30s", "99999999999999999999"}},
		{"PUBLIC_URL", publicURL, []string{"example.com", "ftp://example.com", "https://", "https://example.com:65536",
			"https://example.com/?", "https://example.com/?a=b", "https://example.com/#", "https://exa mple.com",
			`http://h/a"<b>`, "http://h/%zz"}},
		{"PORT", port, []string{"http", "65536", "-1"}},
	} {
		for _, value := range test.values {
			wantProblems(t, []string{test.variable + "=" + value}, fmt.Sprintf("%s %q: want %s", test.variable, value, test.want))
		}
	}
	// May hold a password.
	for _, test := range []struct {
		variable, want string
		values         []string
	}{
		{"DIAL_TO", dialTo, []string{"sip:user:s3cret@host x", "sip:a@b</User><Number>1", "sip:a@b\nc"}},
		{"PUBLIC_URL", publicURL, []string{"https://user:s3cret@example.com"}},
		{"PLIVO_AUTH_TOKEN", authToken, []string{"s3cret\n", "s3 cret"}},
		{"PHLO_BASIC_AUTH", basicAuth, []string{"s3cret", ":s3cret", "s3cret:", "\ns3cret"}},
	} {
		for _, value := range test.values {
			wantProblems(t, []string{test.variable + "=" + value}, fmt.Sprintf("%s %q: want %s", test.variable, "(not shown)", test.want))
		}
	}
	const production = ` "": want a value when MARTINI_ENV is production`
	wantProblems(t, []string{"MARTINI_ENV=production"}, "DIAL_TO"+production, "PUBLIC_URL"+production, "PLIVO_AUTH_TOKEN"+production)
	wantProblems(t, []string{"MARTINI_ENV=production", "DIAL_TO=12025550101", "PUBLIC_URL=https://example.com"}, "PLIVO_AUTH_TOKEN"+production)
	wantProblems(t, []string{"PORT=a", "CALLER_ID=d"}, `CALLER_ID "d": want `+callerID, `PORT "a": want `+port)
}

// wantProblems checks for the lines of the error of an environment.
func wantProblems(t *testing.T, variables []string, problems ...string) {
	t.Run(strings.Join(variables, " "), func(t *testing.T) {
		t.Helper()
		_, err := configure(environment(variables...))
		if want := strings.Join(problems, "\n"); err == nil || err.Error() != want {
			t.Errorf("got:\n%v\nwant:\n%s", err, want)
		}
	})
}

func FuzzAnswerURL(f *testing.F) { fuzz(f, "/dialstatus/", ringingCall) }
func FuzzActionURL(f *testing.F) { fuzz(f, "/dialstatus/action/", completedDial) }

// fuzz sends what strangers may send to a route. It is never answered with a 5xx; a 200 is a
// well-formed <Response>; there is one record, of one line, for each request. Where a token is set,
// nothing unsigned gets a 200, and the same form, signed, is never forbidden.
func fuzz(f *testing.F, path, form string) {
	multipartBody, multipartType := multipartForm(f, strings.Split(form, "&")...)
	signature := sign(testToken, publicURL+path, form, testNonce)
	f.Add(form, "application/x-www-form-urlencoded", "", "localhost:8080", "", "", signature[1:], testNonce, "")
	f.Add(form, "application/x-www-form-urlencoded; charset=utf-8", "a=b", "h", "https", "abc.ngrok.app, h", signature[1:]+", c2lnbmVk,", testNonce, "Basic Og==")
	f.Add(multipartBody, multipartType, "DialStatus=busy", "[::1]:80", "http", "[::1", "", "", "Bearer x")
	f.Add(hangupCall, "application/x-www-form-urlencoded", "CallStatus=busy&CallStatus=x", "a<b", "ftp, https", "a/b", ",", "0", "Basic !")
	f.Add("", "", "", "", "", "", "", "", "")
	f.Add(`{"DialStatus":"busy"}`, "application/json", "#%", "%zz", "", "user@h", "", "", "")
	f.Add("DialStatus=%zz&From=</Response>", "multipart/form-data", "?&&;", "h:99999", "", "", "", "", "")

	open := newTestApp(f)
	closed := newTestApp(f, "PLIVO_AUTH_TOKEN="+testToken, "PHLO_BASIC_AUTH="+testLogin)
	configured := newTestApp(f, "PLIVO_AUTH_TOKEN="+testToken, "PUBLIC_URL="+publicURL)
	f.Fuzz(func(t *testing.T, body, contentType, query, host, proto, forwardedHost, signature, nonce, authorization string) {
		target, err := url.ParseRequestURI(path + "?" + query)
		if err != nil {
			t.Skip("net/http refuses it")
		}
		send := func(app *testApp, r *http.Request) (status int) {
			answer, records := app.send(r)
			if answer.Code >= 500 || len(records) != 1 || !json.Valid([]byte(records[0])) {
				t.Errorf("%d %s\nlog: %s", answer.Code, answer.Body, records)
			}
			if answer.Code == 200 {
				wantResponse(t, answer.Body)
			}
			return answer.Code
		}
		strange := func() *http.Request {
			r := post(path, body, "Content-Type: "+contentType, "Host: "+host, "X-Forwarded-Proto: "+proto, "X-Forwarded-Host: "+forwardedHost,
				v3+": "+signature, maV3+": "+signature, v3Nonce+": "+nonce, "Authorization: "+authorization)
			r.URL = target
			return r
		}
		send(open, strange())
		if send(closed, strange()) == 200 {
			t.Error("answered without a signature")
		}
		if _, err := parseQuery(body); err == nil && send(configured, signed(path, body, v3)) == 403 {
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

// TestMain lets the test binary be the server itself, so that the tests have a process of it, or
// the guide's app, to be measured beside it.
func TestMain(m *testing.M) {
	switch os.Getenv("TEST_SERVER") {
	case "dialstatus":
		main()
	case "guide":
		log.Fatal(http.ListenAndServe(os.Getenv("HOST")+":"+os.Getenv("PORT"), guideApp(os.Stdout)))
	default:
		os.Exit(m.Run())
	}
}

// process is a running server.
type process struct {
	*exec.Cmd
	url    string
	log    chan []byte // all of it but the first record, when the process has ended
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
	p.Env = append([]string{"TEST_SERVER=dialstatus", "GOCOVERDIR=" + p.Dir, "HOST=127.0.0.1", "PORT=0"}, variables...)
	p.Stderr = &p.stderr
	stdout, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Process.Kill() })
	log := bufio.NewReader(stdout)
	first, _ := log.ReadString('\n')
	var listening struct{ Msg, Address string }
	if json.Unmarshal([]byte(first), &listening); listening.Msg == "listening" {
		p.url = "http://" + listening.Address
	}
	p.log = make(chan []byte, 1)
	go func() {
		rest, _ := io.ReadAll(log)
		p.log <- rest
	}()
	return p
}

// stop sends a signal, and answers the rest of the log when the process has ended with status 0.
func (p *process) stop(t *testing.T, signal os.Signal) (records []string) {
	t.Helper()
	p.Process.Signal(signal)
	rest := <-p.log
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
			defer answer.Body.Close()
			body, _ := io.ReadAll(answer.Body)
			if want := strings.Replace(dialXML, "http://example.com", server.url, 1); string(body) != want {
				t.Errorf("got %s, want %s", body, want)
			}
			if answer, err = http.Get(server.url + "/index.html"); err != nil || answer.StatusCode != 404 {
				t.Errorf("a file: %v, %v", answer, err)
			}

			records := server.stop(t, signal)
			want := []string{
				`{"level":"WARN","msg":"DIAL_TO is not set: calls are forwarded to a number reserved for fiction"}`,
				`{"level":"WARN","msg":"PLIVO_AUTH_TOKEN is not set: requests from anybody are answered, signed or not"}`,
				ringingRecord,
				`{"level":"WARN","msg":"rejected","status":404,"reason":"not found: send to /dialstatus/ or /dialstatus/action/","path":"/index.html","url":"` + server.url + `/index.html"}`,
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

func TestSecondSignalDoesNotWait(t *testing.T) {
	server := start(t)
	connection, err := net.Dial("tcp", strings.TrimPrefix(server.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	io.WriteString(connection, "POST /dialstatus/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n")
	bufio.NewReader(connection).ReadString('\n') // it waits for the body
	ended := make(chan error, 1)
	go func() { ended <- server.Wait() }()
	for {
		server.Process.Signal(os.Interrupt)
		select {
		case err := <-ended:
			if err == nil {
				t.Error("waited for the request")
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
		{"the port is taken", []string{"PORT=" + port}, []string{"HOST and PORT: listen tcp 127.0.0.1:" + port + ": bind: address already in use"}},
		{"the host is not here", []string{"HOST=192.0.2.1"}, []string{"HOST and PORT: listen tcp 192.0.2.1:0: bind:"}},
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

func TestHeaderLimit(t *testing.T) {
	server := start(t)
	for size, status := range map[int]int{31 << 10: 200, 33 << 10: 431, 100 << 10: 431} {
		r, _ := http.NewRequest(http.MethodPost, server.url+"/dialstatus/", nil)
		r.Header.Set("X", strings.Repeat("a", size))
		if answer, err := http.DefaultClient.Do(r); err != nil || answer.StatusCode != status {
			t.Errorf("a header of %d bytes: %v, %v; want %d", size, answer, err, status)
		}
	}
}

// 1,500 clients drip their requests, half of them the header and half the body. All are cut off,
// while good requests are answered and memory stays low.
func TestSlowClients(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 10 seconds")
	}
	t.Parallel()
	server := start(t)
	address := strings.TrimPrefix(server.url, "http://")
	const clients = 1500
	cutOff := make(chan bool, clients)
	for i := range clients {
		go func() {
			limit := 10 * time.Second // to send all of it
			if i%2 == 0 {
				limit = 5 * time.Second // to send the header
			}
			began := time.Now()
			defer func() {
				if after := time.Since(began); after > limit+4*time.Second {
					t.Errorf("cut off after %v, not %v", after, limit)
				}
				cutOff <- true
			}()
			connection, err := net.Dial("tcp", address)
			if err != nil {
				t.Error(err)
				return
			}
			defer connection.Close()
			request := "POST /dialstatus/ HTTP/1.1\r\nHost: localhost\r\n"
			if i%2 == 1 {
				request += "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 60000\r\n\r\n"
			}
			io.WriteString(connection, request)
			closed := make(chan struct{})
			go func() {
				defer close(closed)
				io.Copy(io.Discard, connection)
			}()
			for {
				select {
				case <-closed:
					return
				case <-time.After(time.Second):
					io.WriteString(connection, "a")
				}
			}
		}()
	}
	for left := clients; left > 0; {
		select {
		case <-cutOff:
			left--
		case <-time.After(100 * time.Millisecond):
			if !wantAnswer(t, server.url, "") {
				t.Fatal("a good request was not answered")
			}
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", server.Process.Pid))
	if err != nil {
		t.Skip("this system does not tell the peak of memory: ", err)
	}
	var peak int
	_, line, _ := strings.Cut(string(status), "VmHWM:")
	if fmt.Sscan(line, &peak); peak == 0 || peak > 80<<10 {
		t.Errorf("peak memory: %d KiB", peak)
	} else {
		t.Logf("peak memory: %d KiB", peak)
	}
}

// wantAnswer posts the end of a dial with this CallUUID, and checks that the answer is whole. It
// tells whether there was one.
func wantAnswer(t *testing.T, server, callUUID string) bool {
	answer, err := http.PostForm(server+"/dialstatus/action/", url.Values{"DialStatus": {"completed"}, "CallUUID": {callUUID}})
	if err != nil {
		return false
	}
	defer answer.Body.Close()
	if body, err := io.ReadAll(answer.Body); answer.StatusCode != 200 || err != nil || string(body) != hangupXML {
		t.Errorf("answer: %d %q %v", answer.StatusCode, body, err)
	}
	return true
}

// Every request that got its answer is in the log, once, though the server is stopped under load.
func TestStopUnderLoad(t *testing.T) {
	server := start(t)
	var answered sync.Map
	var clients sync.WaitGroup
	for client := range 8 {
		clients.Go(func() {
			for i := 0; ; i++ {
				callUUID := fmt.Sprintf("call-%d-%d", client, i)
				if !wantAnswer(t, server.url, callUUID) {
					return
				}
				answered.Store(callUUID, true)
			}
		})
	}
	time.Sleep(300 * time.Millisecond)
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
	count := 0
	for callUUID := range answered.Range {
		count++
		if n := reported[callUUID.(string)]; n != 1 {
			t.Errorf("%s is %d times in the log", callUUID, n)
		}
	}
	if count < 100 {
		t.Errorf("only %d requests were answered", count)
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
	go io.Copy(io.Discard, log)
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

// sink takes log records. Unlike io.Discard, which makes log.Logger format nothing.
type sink struct{}

func (sink) Write(record []byte) (int, error) { return len(record), nil }

// bareHandler is the least that net/http can do: it parses the form and answers.
func bareHandler(w http.ResponseWriter, r *http.Request) {
	r.ParseForm()
	w.Header().Set("Content-Type", "application/xml")
	io.WriteString(w, hangupXML)
}

// bareWriter takes answers.
type bareWriter http.Header

func (w bareWriter) Header() http.Header              { return http.Header(w) }
func (w bareWriter) Write(answer []byte) (int, error) { return len(answer), nil }
func (w bareWriter) WriteHeader(status int)           {}

// Each route, in the guide's app, in a bare net/http handler, in this app, and in this app with a
// signature to check. x-guide is the time in proportion to the guide's.
func Benchmark(b *testing.B) {
	this := func(variables ...string) http.Handler {
		cfg, err := configure(environment(append(variables, "PUBLIC_URL="+publicURL)...))
		if err != nil {
			b.Fatal(err)
		}
		return newApp(cfg, slog.New(slog.NewJSONHandler(sink{}, nil)))
	}
	for _, route := range []struct{ name, path, form string }{
		{"answer", "/dialstatus/", ringingCall},
		{"action", "/dialstatus/action/", completedDial},
	} {
		var guide float64
		for _, app := range []struct {
			name string
			http.Handler
		}{
			{"guide", guideApp(sink{})},
			{"floor", http.HandlerFunc(bareHandler)},
			{"dialstatus", this()},
			{"dialstatus-signed", this("PLIVO_AUTH_TOKEN=" + testToken)},
		} {
			b.Run(route.name+"/"+app.name, func(b *testing.B) {
				request := signed(route.path, route.form, v3)
				answer := httptest.NewRecorder()
				if app.ServeHTTP(answer, request); answer.Code != 200 {
					b.Fatal(answer.Code, answer.Body)
				}
				writer := make(bareWriter)
				b.ReportAllocs()
				for b.Loop() {
					r := *request
					r.Form, r.PostForm, r.Body = nil, nil, io.NopCloser(strings.NewReader(route.form))
					app.ServeHTTP(writer, &r)
				}
				perOp := float64(b.Elapsed()) / float64(b.N)
				if app.name == "guide" {
					guide = perOp
				}
				b.ReportMetric(perOp/guide, "x-guide")
			})
		}
	}
}
