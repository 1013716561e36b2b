// Dialstatus reports what became of every call that Plivo forwards. It is
// Plivo's guide "Dial Status Reporting Using Go", made fit for real calls:
//
//	POST /dialstatus/         the answer URL: a call gets the XML that dials;
//	                          its called legs and its end are reported here
//	POST /dialstatus/action/  the <Dial>'s action URL: what became of it is
//	                          reported, and the XML carries the call on
//
// Titles in quotes below are pages of Plivo's documentation.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"html"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/go-martini/martini"
	"github.com/plivo/plivo-go/v7/xml"
)

const (
	answerPath = "/dialstatus" // Martini also matches it with a slash at its end
	actionPath = "/dialstatus/action"

	maxBody       = 64 << 10                // bytes of a body; Plivo sends less than 1 KiB
	maxValue      = 256                     // bytes of a value in the log; Plivo sends less than 100
	maxRejections = 20                      // in the log in a second
	drainTime     = time.Second             // from SIGTERM until the server stops listening
	lateTime      = 500 * time.Millisecond  // then, for requests on open connections
	graceTime     = 1500 * time.Millisecond // then, for requests still unfinished

	required, secret = 1, 2 // a variable's rules: needed in production; never printed

	fictionalNumber = "+12025550123"
)

func main() {
	if len(os.Args) > 1 {
		output, status := os.Stderr, 2
		if os.Args[1] == "-h" || os.Args[1] == "--help" {
			output, status = os.Stdout, 0
		}
		fmt.Fprint(output, "dialstatus forwards the calls to a Plivo number, and reports what became ",
			"of each\none: a line of JSON on stdout. Environment variables configure it:\n\n")
		for _, v := range variables {
			fmt.Fprintf(output, "%-16s  %s\n", v.name, v.want)
		}
		os.Exit(status)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(200) // 8 % faster, for 4 MiB of memory
	}
	signal.Ignore(syscall.SIGPIPE) // a write to a closed stdout is an error, not the end
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := run(ctx, os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// run serves until ctx is done, then lets the requests under way finish. It
// logs JSON lines to stdout, and to stderr where stdout fails. Its error says
// why it could not start, a line for each problem, or why it had to stop.
func run(ctx context.Context, getenv func(string) string, stdout, stderr io.Writer) error {
	cfg, err := configure(getenv)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", cfg.address)
	if err != nil {
		return fmt.Errorf("HOST and PORT: %w", err)
	}
	log := slog.New(slog.NewJSONHandler(&sink{stdout: stdout, stderr: stderr}, nil))
	log.Info("listening", "address", listener.Addr().String())
	if isFictional(cfg.dialTo) {
		log.Warn("DIAL_TO has a number that is reserved for fiction: nobody answers it")
	}
	if cfg.authToken == "" {
		log.Warn("PLIVO_AUTH_TOKEN is not set: anybody is answered, with PHLO_BASIC_AUTH or without")
	}
	server := newServer(ctx, newApp(cfg, log))
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	if !strings.HasPrefix(context.Cause(ctx).Error(), os.Interrupt.String()) {
		// After SIGTERM, not after Ctrl-C: from Shutdown on no request is
		// read, and clients must have closed their connections before it.
		time.Sleep(drainTime)
		listener.Close()
		time.Sleep(lateTime)
	}
	grace, cancel := context.WithTimeout(context.Background(), graceTime)
	defer cancel()
	server.Shutdown(grace) // what is not finished by then ends with the process
	return nil
}

// newServer returns the app's server with its limits. When ctx is done, the
// context of each request is done, too.
func newServer(ctx context.Context, a *app) *http.Server {
	return &http.Server{
		Handler:           a,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelWarn),
		MaxHeaderBytes:    28 << 10, // net/http adds 4 KiB: 32 in all
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,  // header and body
		WriteTimeout:      15 * time.Second,  // longer, so that a slow body gets its 400
		IdleTimeout:       620 * time.Second, // longer than Google's load balancer's 600 s
	}
}

// config is what the environment says, checked. What it does not say is empty
// or has its default.
type config struct {
	address     string // where to listen, host:port
	dialTo      string // E.164 numbers and SIP URIs, separated by commas
	callerID    string // that the called party sees
	dialTimeout int    // seconds to let it ring
	publicURL   string // by which Plivo reaches this server, no slash at its end
	authToken   string // with which Plivo signs
	basicAuth   string // user:password of PHLO's HTTP Request node
}

// variables lists the environment variables, and what each must be.
var variables = []struct {
	name    string
	rules   int
	isValid func(value string) bool
	want    string
}{
	{"DIAL_TO", required, isDialTo, "E.164 numbers, country code first (" + fictionalNumber + "), " +
		"and SIP URIs (sip:user@example.com), separated by commas"},
	{"CALLER_ID", 0, matches(number), "an E.164 number of your account (" + fictionalNumber + ")"},
	{"DIAL_TIMEOUT", 0, matches(`[1-9][0-9]{0,8}`), "whole seconds to let it ring, at least 1"},
	{"PUBLIC_URL", required, isBaseURL, "the URL by which Plivo reaches this server: http or https, " +
		"a host, perhaps a path, and nothing else; take " + answerPath + "/ off its end"},
	{"HOST", 0, matches(`[\w.-]+|[\w.]*:[\w.]*:[\w.:%-]*`), "a name or an address to listen on"},
	{"PORT", 0, matches(port), "a port number to listen on, 0 to 65535"},
	{"PLIVO_AUTH_TOKEN", required | secret, matches(`\S+`), "the auth token as the console shows it"},
	{"PHLO_BASIC_AUTH", secret, matches(`[^:[:cntrl:]]+:[^[:cntrl:]]+`), "user:password"},
	{"MARTINI_ENV", 0, matches(`development|test|production`), "development, test or production"},
}

// configure reads and checks the environment. Its error has a line for every
// problem, with the value unless that may hold a password.
func configure(getenv func(string) string) (config, error) {
	var problems []error
	for _, v := range variables {
		value, want := getenv(v.name), v.want
		switch {
		case value == "" && v.rules&required != 0 && getenv("MARTINI_ENV") == martini.Prod:
			want = "a value when MARTINI_ENV is " + martini.Prod
		case isQuoted(value):
			want = "it without the quotes around it"
		case value == "" || v.isValid(value):
			continue
		}
		if value != "" && v.rules&secret != 0 || hasPassword(value) {
			value = "(not shown)"
		}
		problems = append(problems, fmt.Errorf("%s %q: want %s", v.name, value, want))
	}
	dialTimeout, _ := strconv.Atoi(getenv("DIAL_TIMEOUT")) // 0 where it is not set
	return config{
		address:     net.JoinHostPort(getenv("HOST"), cmp.Or(getenv("PORT"), "8080")),
		dialTo:      cmp.Or(getenv("DIAL_TO"), fictionalNumber),
		callerID:    getenv("CALLER_ID"),
		dialTimeout: dialTimeout,
		publicURL:   strings.TrimRight(getenv("PUBLIC_URL"), "/"),
		authToken:   getenv("PLIVO_AUTH_TOKEN"),
		basicAuth:   getenv("PHLO_BASIC_AUTH"),
	}, errors.Join(problems...)
}

const (
	number      = `\+?[1-9][0-9]{6,14}` // E.164
	destination = `\s*(` + number + `|sip:[!#-+\--;=?A-~]+@[!#-+\--;=?A-~]+)\s*`
	port        = `[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]`
)

var (
	isDialTo    = matches(destination + `(,` + destination + `)*`)
	isFictional = matches(`(.*,)?\s*\+?1[0-9]{3}55501[0-9]{2}\s*(,.*)?`) // +1 NPA 555 0100 to 0199
	isQuoted    = matches(`(?s)".*"|'.*'`)
	hasPassword = matches(`(?s).*(@|%40).*`) // may have: in a URI, user:password ends in "@"
	isURL       = matches(`https?://([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])` +
		`(:(` + port + `))?(/[A-Za-z0-9._~%/-]*)?`)
	endsInRoute = matches(`https?://[^/]+(/.*)?(` + answerPath + `|` + actionPath + `)/*`)
)

// matches returns a function that reports whether all of a text matches.
func matches(expression string) func(text string) bool {
	return regexp.MustCompile(`^(` + expression + `)$`).MatchString
}

// isBaseURL reports whether a text is a URL to which the routes can be added.
func isBaseURL(text string) bool {
	_, err := url.Parse(text)
	return err == nil && isURL(text) && !endsInRoute(text)
}

// An app answers Plivo's requests and reports what they say.
type app struct {
	config
	log      *slog.Logger
	routes   martini.Router
	martini  *martini.Martini
	dial     []byte       // the document for a call, where there is a PUBLIC_URL
	macs     sync.Pool    // HMACs with the auth token
	second   atomic.Int64 // Unix time of the last rejection
	rejected atomic.Int64 // requests rejected in that second
}

// newApp returns the Martini app with its two routes. What every request needs
// stands around Martini, not in middleware, which costs reflection on each.
func newApp(cfg config, log *slog.Logger) *app {
	a := &app{config: cfg, log: log, routes: martini.NewRouter(), martini: martini.New()}
	a.dial = a.dialDocument(cfg.publicURL)
	a.macs.New = func() any { return hmac.New(sha256.New, []byte(cfg.authToken)) }
	a.routes.Post(answerPath, a.checked(a.answer))
	a.routes.Post(actionPath, a.checked(a.action))
	a.routes.NotFound(a.notFound)
	a.martini.Action(a.routes.Handle)
	return a
}

// ServeHTTP bounds the body of a request and contains the panic of a handler:
// the log has its cause, the sender gets a plain 500.
func (a *app) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if cause := recover(); cause != nil {
			a.log.Error("panic", "cause", cut(fmt.Sprint(cause)), "path", cut(r.URL.Path),
				"stack", string(debug.Stack()))
			http.Error(w, "internal server error", http.StatusInternalServerError)
		}
	}()
	if r.Context().Err() != nil {
		w.Header().Set("Connection", "close") // the server is about to stop
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxBody) // a longer one is an error
	a.martini.ServeHTTP(w, r)
}

// answer serves the answer URL. A call gets the <Dial>. An event of a called
// leg ("Dial XML") and the end of a call whose application has no hangup URL
// ("Application API") get an empty <Response>. All are reported. Its error is
// that of base.
func (a *app) answer(r *http.Request) (response []byte, err error) {
	switch {
	case r.Form.Get("DialAction") != "":
		a.report(r, slog.LevelInfo, "leg")
		return emptyDocument, nil
	case r.Form.Get("Event") == "Hangup" || isFinal[r.Form.Get("CallStatus")]:
		a.report(r, slog.LevelInfo, "hangup")
		return emptyDocument, nil
	}
	base, err := a.base(r)
	if err != nil {
		return nil, err
	}
	a.report(r, slog.LevelInfo, "call")
	if base == a.publicURL {
		return a.dial, nil
	}
	return a.dialDocument(base), nil
}

// action serves the action URL. It reports what became of the <Dial> and
// returns what follows ("Dial XML"). Its error is that there is no DialStatus.
func (a *app) action(r *http.Request) (response []byte, err error) {
	status := r.Form.Get("DialStatus")
	if status == "" {
		return nil, errors.New("DialStatus is missing: send the form that Plivo posts here")
	}
	level, followUp := slog.LevelInfo, followUps[status]
	if followUp == nil {
		level, followUp = slog.LevelWarn, otherFollowUp
	}
	a.report(r, level, "dial")
	return followUp, nil
}

// notFound answers 405 where a route has another method, as to a browser at the
// answer URL, else 404.
func (a *app) notFound(w http.ResponseWriter, r *http.Request) {
	if allowed := strings.Join(a.routes.MethodsFor(r.URL.Path), ", "); allowed != "" {
		base, _ := a.base(r)
		w.Header().Set("Allow", allowed)
		a.reject(w, r, http.StatusMethodNotAllowed, "dialstatus runs, but not for "+r.Method+": send "+
			allowed+", such as curl -d CallStatus=ringing "+base+answerPath+"/")
		return
	}
	var paths []string
	for _, route := range a.routes.All() {
		paths = append(paths, route.Pattern()+"/")
	}
	a.reject(w, r, http.StatusNotFound, "not found: send to "+strings.Join(paths, " or "))
}

var (
	// isFinal has each CallStatus of a call that is over.
	isFinal = map[string]bool{"completed": true, "busy": true, "failed": true,
		"timeout": true, "no-answer": true, "cancel": true}

	// records has the fields of each record. Up to ten keep it below 16 KiB,
	// where Docker splits lines.
	records = map[string][]string{
		"call": {"CallUUID", "From", "To", "Direction", "CallStatus"},
		"leg": {"DialAction", "DialALegUUID", "DialBLegUUID", "DialBLegTo", "DialBLegStatus",
			"DialBLegDuration", "DialBLegHangupCause", "DialBLegHangupSource", "CallUUID"},
		"dial": {"DialStatus", "DialALegUUID", "DialBLegUUID", "DialRingStatus", "DialHangupCause",
			"CallUUID", "From", "To"},
		"hangup": {"CallUUID", "From", "To", "Direction", "CallStatus", "HangupCause", "Duration"},
	}

	hangup = new(xml.HangupElement)
	speak  = new(xml.SpeakElement).AddSpeak

	// followUps has what a caller hears after each DialStatus. After the first
	// two nobody listens.
	followUps = map[string][]byte{
		"completed": document(hangup),
		"cancel":    document(hangup),
		"busy":      document(speak("The line is busy. Please try again later."), hangup),
		"no-answer": document(speak("Nobody answered. Please try again later."), hangup),
		"timeout": document(
			speak("The call could not be connected in time. Please try again later."), hangup),
		"failed": document(speak("The call could not be connected."), hangup),
	}
	otherFollowUp = document(speak("The call has ended."), hangup)
	emptyDocument = document()
)

// dialDocument returns the XML for a call. Its URLs begin with base, as they
// must be fully qualified ("Dial XML").
func (a *app) dialDocument(base string) []byte {
	var contents []any
	for destination := range strings.SplitSeq(a.dialTo, ",") {
		destination = html.EscapeString(strings.TrimSpace(destination)) // plivo-go does not escape
		if strings.HasPrefix(destination, "sip:") {
			contents = append(contents, new(xml.UserElement).SetContents(destination))
		} else {
			contents = append(contents, new(xml.NumberElement).SetContents(destination))
		}
	}
	dial := new(xml.DialElement).
		SetAction(base + actionPath + "/").
		SetMethod(http.MethodPost).
		SetRedirect(true).
		SetCallbackUrl(base + answerPath + "/").
		SetCallbackMethod(http.MethodPost).
		SetContents(contents)
	if a.callerID != "" {
		dial = dial.SetCallerID(a.callerID)
	}
	if a.dialTimeout != 0 {
		dial = dial.SetTimeout(a.dialTimeout)
	}
	return document(dial)
}

// document returns the XML of a <Response>. It panics where plivo-go returns
// the text of an error instead, which would be a mistake in this program.
func document(elements ...any) []byte {
	response := xml.ResponseElement{Contents: elements}.String()
	if !strings.HasPrefix(response, "<Response>") {
		panic("plivo-go: " + response)
	}
	return []byte(response)
}

// report logs one record with its fields of the form.
func (a *app) report(r *http.Request, level slog.Level, record string) {
	attributes := make([]slog.Attr, 0, 9)
	for _, field := range records[record] {
		attributes = append(attributes, slog.String(field, cut(r.Form.Get(field))))
	}
	a.log.LogAttrs(r.Context(), level, record, attributes...)
}

// reject answers in one plain line why a request is not served, and logs it.
// The log gets maxRejections in a second: a flood of them must not push reports
// out of it.
func (a *app) reject(w http.ResponseWriter, r *http.Request, status int, reason string) {
	reason = cut(reason)
	omitted, now := int64(0), time.Now().Unix()
	if a.second.Swap(now) != now {
		omitted = max(0, a.rejected.Swap(0)-maxRejections)
	}
	if a.rejected.Add(1) <= maxRejections {
		base, _ := a.base(r)
		a.log.Warn("rejected", "status", status, "reason", reason, "path", cut(r.URL.Path),
			"url", cut(base+r.URL.RequestURI()), "peer", r.RemoteAddr, "X-Forwarded-For",
			cut(strings.Join(r.Header["X-Forwarded-For"], ", ")), "omitted", omitted)
	}
	http.Error(w, reason, status)
}

// cut returns a text, or of one over maxValue its beginning and a mark.
func cut(text string) string {
	if len(text) <= maxValue {
		return text
	}
	return fmt.Sprintf("%s... (%d bytes)", strings.ToValidUTF8(text[:maxValue], ""), len(text))
}

// A sink takes the log's records, a whole one in each Write and one at a time.
// What stdout does not take goes to stderr.
type sink struct {
	stdout, stderr io.Writer
	half           bool     // stdout ends inside a record
	told           []string // errors of stdout, each told once on stderr
}

// Write returns an error only where neither takes the record.
func (s *sink) Write(record []byte) (int, error) {
	line := record
	if s.half {
		line = append([]byte("\n"), record...)
	}
	n, err := s.stdout.Write(line)
	if n > 0 {
		s.half = line[n-1] != '\n'
	}
	if err == nil {
		return len(record), nil
	}
	if cause := err.Error(); !slices.Contains(s.told, cause) {
		s.told = append(s.told, cause)
		slog.New(slog.NewJSONHandler(s.stderr, nil)).
			Error("stdout failed: what it does not take is here", "cause", cause)
	}
	return s.stderr.Write(record)
}

// checked returns a handler that writes next's response. It rejects a request
// whose form cannot be read, whose sender is not authorized, or that next
// refuses.
func (a *app) checked(next func(*http.Request) ([]byte, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		response, err := []byte(nil), readForm(r)
		if err == nil {
			err = a.authorize(r)
		}
		if err == nil {
			response, err = next(r)
		}
		if err != nil {
			a.reject(w, r, cmp.Or(statuses[err], http.StatusBadRequest), err.Error())
			return
		}
		w.Header().Set("Content-Type", "application/xml")
		w.Write(response)
	}
}

var (
	errForbidden = errors.New("forbidden: Plivo has not signed this. If it called another URL, set " +
		"PUBLIC_URL; if not, PLIVO_AUTH_TOKEN is not that of the number's account")
	errTooLong = fmt.Errorf("the body is too long: send %d bytes at most", maxBody)
	errNotForm = errors.New("the body is not a form: send application/x-www-form-urlencoded")

	// statuses has the statuses of errors; that of any other is 400.
	statuses = map[error]int{errForbidden: 403, errTooLong: 413, errNotForm: 415}
)

// readForm parses the body into r.PostForm, and query and body into r.Form,
// where the body counts if both have a field. Its errors are errTooLong,
// errNotForm, and what is wrong with a form.
func readForm(r *http.Request) error {
	body, err := io.ReadAll(r.Body)
	_, tooLong := errors.AsType[*http.MaxBytesError](err)
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	switch mediaType = strings.ToLower(strings.TrimSpace(mediaType)); {
	case tooLong:
		return errTooLong
	case err != nil:
		return errors.New("the body broke off or came too slowly: send all of it, at once")
	case mediaType == "application/x-www-form-urlencoded":
		r.PostForm, err = parseQuery(string(body))
	case mediaType == "multipart/form-data":
		r.Form = url.Values{} // or ParseMultipartForm parses the query, where ";" is an error
		r.Body = io.NopCloser(bytes.NewReader(body))
		err = r.ParseMultipartForm(maxBody) // holds it all: no temporary file
	case len(body) > 0:
		return errNotForm
	}
	if r.Form = r.PostForm; err == nil && r.URL.RawQuery != "" {
		r.Form, err = parseQuery(r.URL.RawQuery)
		maps.Copy(r.Form, r.PostForm)
	}
	if err != nil {
		return fmt.Errorf("the form does not decode: %w", err)
	}
	return nil
}

// parseQuery is url.ParseQuery for a query or a form in which ";" is an
// ordinary character (WHATWG's URL standard).
func parseQuery(text string) (url.Values, error) {
	return url.ParseQuery(strings.ReplaceAll(text, ";", "%3B"))
}

// authorize returns nil for a request of Plivo or PHLO, and for any where there
// is no auth token. Its other errors than errForbidden are those of base.
func (a *app) authorize(r *http.Request) error {
	if a.authToken == "" || a.basicAuth != "" && hasLogin(r, a.basicAuth) {
		return nil
	}
	base, err := a.base(r)
	if err == nil && !a.isSigned(r, base) {
		return errForbidden
	}
	return err
}

// base returns the URL by which Plivo reached this server, up to the route:
// PUBLIC_URL, else the first entries of X-Forwarded-Proto and X-Forwarded-Host,
// else what the request says. Its error is that this is not a valid host.
func (a *app) base(r *http.Request) (string, error) {
	if a.publicURL != "" {
		return a.publicURL, nil
	}
	proto, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Proto"), ",")
	host, _, _ := strings.Cut(r.Header.Get("X-Forwarded-Host"), ",")
	scheme, defaultPort := "http://", ":80"
	if strings.EqualFold(strings.TrimSpace(proto), "https") {
		scheme, defaultPort = "https://", ":443"
	}
	host = strings.TrimSuffix(cmp.Or(strings.TrimSpace(host), r.Host), defaultPort)
	if strings.Contains(host, "/") || !isBaseURL(scheme+host) {
		return "", errors.New("bad Host or X-Forwarded-Host: send a host name or an address")
	}
	return scheme + host, nil
}

// hasLogin reports whether the request has this user:password.
func hasLogin(r *http.Request, login string) bool {
	user, password, ok := r.BasicAuth()
	got, want := sha256.Sum256([]byte(user+":"+password)), sha256.Sum256([]byte(login))
	return ok && hmac.Equal(got[:], want[:])
}

// isSigned reports whether one of the request's V3 signatures was made with the
// auth token; there is one for each active token ("Signature Validation").
// plivo-go's own function is not used: it leaves parts of some requests
// unsigned, and is slow where a form is long.
func (a *app) isSigned(r *http.Request, base string) bool {
	nonce := r.Header.Get("X-Plivo-Signature-V3-Nonce")
	if nonce == "" || strings.Contains(nonce, ".") {
		return false // none, or one whose beginning may be the end of a signed form
	}
	if strings.Contains(r.URL.RawQuery, "#") {
		return false // a fragment: Plivo neither sends nor signs it
	}
	mac := a.macs.Get().(hash.Hash)
	defer a.macs.Put(mac)
	mac.Reset()
	mac.Write(signedText(r, base, nonce))
	want := base64.StdEncoding.AppendEncode(nil, mac.Sum(nil))
	headers := slices.Concat(r.Header["X-Plivo-Signature-V3"], r.Header["X-Plivo-Signature-Ma-V3"])
	signed := false
	for signature := range strings.SplitSeq(strings.Join(headers, ","), ",") {
		signed = hmac.Equal([]byte(strings.TrimSpace(signature)), want) || signed
	}
	return signed
}

// signedText returns what Plivo signs of a POST ("Signature Validation"): the
// URL as it was called, with its query and the form decoded and sorted, and the
// nonce.
func signedText(r *http.Request, base, nonce string) []byte {
	query, _ := parseQuery(r.URL.RawQuery) // it decodes: readForm has seen it
	text := append(make([]byte, 0, 1024), base...)
	text = append(text, r.URL.EscapedPath()...)
	if len(query)+len(r.PostForm) > 0 {
		text = append(text, '?')
	}
	text = appendSorted(text, query, "=", "&")
	if len(query) > 0 && len(r.PostForm) > 0 {
		text = append(text, '.')
	}
	text = appendSorted(text, r.PostForm, "", "")
	text = append(text, '.')
	return append(text, nonce...)
}

// appendSorted appends parameters to a text, sorted by name and then by value,
// with equals between name and value, and ampersand between parameters.
func appendSorted(text []byte, params url.Values, equals, ampersand string) []byte {
	names := slices.AppendSeq(make([]string, 0, len(params)), maps.Keys(params))
	slices.Sort(names)
	for i, name := range names {
		values := params[name]
		if len(values) > 1 {
			values = slices.Sorted(slices.Values(values)) // a copy: r.Form shares it
		}
		for j, value := range values {
			if i+j > 0 {
				text = append(text, ampersand...)
			}
			text = append(append(append(text, name...), equals...), value...)
		}
	}
	return text
}
